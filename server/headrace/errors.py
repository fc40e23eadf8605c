"""Everything that can go wrong, named for what the caller can do about it.

::

    ServingError
    ├── InvalidRequest            the caller must change the request
    │   ├── InvalidTensor             wrong name, datatype, shape or bytes
    │   └── UnusableValues            no on-demand feature view can be given these
    ├── NotFound                  no such thing here
    │   ├── ModelNotFound
    │   ├── ModelVersionNotFound
    │   └── FeaturesNotFound          no such feature service, view or feature
    ├── PreconditionFailed        the request is right, the data behind it is not
    │   ├── MissingFeatures           the model's policy is `reject`
    │   └── FeaturesNotServable       they are registered, and cannot be read here
    ├── PermissionDenied          this server was not started for that
    ├── NotReady                  try again, later or elsewhere
    │   ├── ModelUnavailable          the newest version failed and there is no older one
    │   └── Draining                  this server is stopping
    ├── Overloaded                too much work here: slow down
    │   └── QuotaExceeded             too much work of this caller's
    ├── DeadlineExceeded          ran out of the caller's time before it cost anything
    ├── CallerLeft                nobody waits for the answer any more
    ├── DependencyUnavailable     something behind this server does not answer
    │   ├── FeatureStoreUnavailable
    │   └── BackendUnavailable        the model runs elsewhere, and does not answer there
    ├── ComputationFailed         an on-demand feature view's code ran and failed
    └── BackendError              the model ran and failed

    StartupError                  the server could not start: one line, exit code 2
    ModelLoadError                a model version cannot be loaded: the others go on
    ├── NotYetLoadable                it may be later, as it is: try again
    └── FeaturePlanError              its features cannot be read
        └── UnknownFeatures               there are none of that name
    ProfileError                  a reference profile is not one

Messages carry facts: what was wrong with its value, what was expected, what to do. Never a path,
host, key or a backend's own text: they go to clients. `rpc.status` turns a class into a gRPC code.
"""


class ServingError(Exception):
    """Base of every error a caller may see."""


class InvalidRequest(ServingError):
    """The request can never succeed as it stands."""


class InvalidTensor(InvalidRequest):
    """An input or output has the wrong name, datatype, shape or bytes."""


class NotFound(ServingError):
    """There is no such thing on this server."""


class ModelNotFound(NotFound):
    """No model of that name."""


class ModelVersionNotFound(NotFound):
    """The model exists, that version of it does not."""


class FeaturesNotFound(NotFound):
    """No feature service, feature view or feature of that name."""


class PreconditionFailed(ServingError):
    """The request is right; the data it refers to does not allow an answer."""


class MissingFeatures(PreconditionFailed):
    """Features are missing and the model's `missing_features` policy is `reject`."""


class FeaturesNotServable(PreconditionFailed):
    """The features are registered, and something about them keeps this server from reading them."""


class PermissionDenied(ServingError):
    """The operator has not allowed it on this server."""


class NotReady(ServingError):
    """Not now; the same call may work later or on another replica."""


class ModelUnavailable(NotReady):
    """The model has no version that can serve."""


class Draining(NotReady):
    """This server is stopping and takes no new work."""


class Overloaded(ServingError):
    """
    The queue is full. Slow down; the same call may work later.

    Args:
        message: For people.
        retry_after_s: In how many seconds it may go better, about; None where nobody knows.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def again(self) -> "Overloaded":
        """Return one like it, to be raised: raising one that is kept collects every traceback."""
        return Overloaded(str(self), self.retry_after_s)


class QuotaExceeded(Overloaded):
    """
    This caller has asked for as much as it may.

    Args:
        message: For people.
        retry_after_s: In how many seconds it may ask again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s: float


class DeadlineExceeded(ServingError):
    """The caller's time ran out before the work began."""


class CallerLeft(ServingError):
    """The caller cancelled, or its connection was lost, with time left. Nobody hears it."""


class DependencyUnavailable(ServingError):
    """Something this server needs does not answer."""


class FeatureStoreUnavailable(DependencyUnavailable):
    """The online store did not answer, or not in time."""


class BackendUnavailable(DependencyUnavailable):
    """The model runs on another server, which does not answer."""


class ComputationFailed(ServingError):
    """The code of an on-demand feature view failed."""


class UnusableValues(InvalidRequest, ComputationFailed):
    """Values of a request cannot be given to an on-demand feature view's code."""


class BackendError(ServingError):
    """The model ran and failed."""


class StartupError(Exception):
    """
    The server cannot start with these settings.

    Its message is one line for the operator: paths are allowed in it, secrets are not.
    """


class ModelLoadError(Exception):
    """
    A model version cannot be loaded.

    Its message is for `RepositoryIndex` and the log: it names files relative to the model's folder.
    """


class NotYetLoadable(ModelLoadError):
    """What the version needs is not there now; its own files are not to blame."""


class FeaturePlanError(ModelLoadError):
    """A selection of features cannot be read; a model that needs it cannot be loaded."""


class UnknownFeatures(FeaturePlanError):
    """There is no such feature service, feature view or feature."""


class ProfileError(Exception):
    """A reference profile cannot be made, or what is in the file is not one."""
