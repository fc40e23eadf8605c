"""Which model versions serve, and why the others do not."""

from collections.abc import Sequence
from typing import TypeAlias

from headrace.errors import InvalidRequest, ModelNotFound, ModelUnavailable, ModelVersionNotFound
from headrace.predict import ServedModel
from headrace.repository import state

VERSION_DIGITS_MAX = 18
"""As many as a folder's name may have; they fit an INT64."""


ModelEntry: TypeAlias = "state.ModelEntry[ServedModel]"
"""One model of the repository; see `repository.state`."""


class Catalog:
    """An immutable view of all models, looked up once per request."""

    def __init__(self, entries: Sequence[ModelEntry]) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self._serving: dict[tuple[str, str], ServedModel] = {}
        for entry in entries:
            for number in sorted(entry.versions):
                served = entry.versions[number]
                self._serving[entry.name, str(number)] = served
                self._serving[entry.name, ""] = served  # the highest, in the end
        every = self.served()
        self.sole = every[0] if len(every) == 1 else None
        """The only version that serves; None where there are others, or none."""

    def find(self, name: str, version: str) -> ServedModel:
        """
        Find the version that a request names.

        Args:
            name: The model's folder name.
            version: Decimal text; empty for the highest serving version.

        Raises:
            ModelNotFound: no such model.
            ModelVersionNotFound: no such version of it.
            ModelUnavailable: it is there and cannot serve.
            InvalidRequest: the version is not a positive number.
        """
        served = self._serving.get((name, version))
        return served if served is not None else self._look_harder(name, version)

    def serving(self, name: str, version: str) -> ServedModel | None:
        """Return what `find` would, if it serves under exactly these names."""
        return self._serving.get((name, version))

    def entry(self, name: str) -> ModelEntry:
        """
        Find a model, serving or not.

        Raises:
            ModelNotFound: no such model.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise ModelNotFound(f"Request for unknown model: '{name}' is not found") from None

    def is_ready(self, name: str, version: str = "") -> bool:
        """Say whether that version serves; False for an unknown one."""
        try:
            self.find(name, version)
        except (ModelNotFound, ModelVersionNotFound, ModelUnavailable):
            return False
        return True

    def served(self) -> Sequence[ServedModel]:
        """All serving versions."""
        return [served for entry in self.entries.values() for served in entry.versions.values()]

    def _look_harder(self, name: str, version: str) -> ServedModel:
        entry = self.entry(name)
        if not version:
            raise ModelUnavailable(f"model '{name}' has no version that can serve")
        is_number = version.isascii() and version.isdecimal() and len(version) <= VERSION_DIGITS_MAX
        if not is_number or not int(version):
            raise InvalidRequest(
                f"failed to get model version from specified version string '{version[:40]}', "
                "version should be an integral value > 0"
            )
        number = int(version)
        if number in entry.versions:  # written with leading zeros
            return entry.versions[number]
        if number in entry.failures:
            raise ModelUnavailable(
                f"Request for unknown model: '{name}' version {number} is not at ready state"
            )
        raise ModelVersionNotFound(
            f"Request for unknown model: '{name}' version {number} is not found"
        )
