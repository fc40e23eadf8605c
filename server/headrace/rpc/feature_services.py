"""The services that read features as they are: Headrace's own, and Feast's under two names.

Importing this imports Feast, which takes seconds: only where there is a feature repository.
"""

from collections.abc import Callable

from headrace.batching.accounts import CallerAccounts
from headrace.feature_reads import FeatureReads
from headrace.features.plans import FeaturePlans
from headrace.rpc import feast_serving, features
from headrace.rpc.feast_writes import FeatureWrites
from headrace.rpc.ingress import HotMethod
from headrace.telemetry.calls import CallRecorder


class FeatureServices:
    """
    Everything on the port that is about features without a model.

    Args:
        reads: Takes the requests.
        plans: What there is.
        calls: Decides which calls are traced, and is told of those that fail.
        as_feast: Whether Feast's services answer as Feast itself does.
        is_ready: Whether features can be read.
        writes: The writing methods.
        accounts: Know the callers of the reading methods; None where it makes no difference.

    Attributes:
        names: Of the services.
        hot_methods: Straight from the port.
        handlers: The others.
    """

    def __init__(
        self,
        reads: FeatureReads,
        plans: FeaturePlans,
        calls: CallRecorder,
        *,
        as_feast: bool,
        is_ready: Callable[[], bool],
        writes: FeatureWrites,
        accounts: CallerAccounts | None = None,
    ) -> None:
        self.is_ready = is_ready
        feast_services = (feast_serving.SERVING_SERVICE, feast_serving.FEATURE_SERVER)
        self.names = (features.SERVICE, *feast_services)
        own = features.GetOnlineFeatures(reads, calls, accounts)
        self.hot_methods = [HotMethod(own.path, own.accept)]
        for service in feast_services:
            method = feast_serving.GetOnlineFeatures(
                service, reads, plans, calls, as_feast=as_feast, accounts=accounts
            )
            self.hot_methods.append(HotMethod(method.path, method.accept))
        self.hot_methods += writes.hot_methods
        metadata = features.FeatureMetadataServicer(plans)
        self.handlers = (metadata.handler(), feast_serving.info_handler())
