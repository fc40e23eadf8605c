"""Keeps what serves in step with what lies in the model repository.

One thread looks, decides (`policy`) and carries out, one action at a time: copy the version, check
the copy, load it, swap it in, let the old one finish. Requests never wait for any of it.

Source: TensorFlow Serving's split of source, policy and manager; Triton's control modes.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Generic, Literal

import structlog
import watchfiles

from headrace.errors import ModelLoadError, NotYetLoadable, StartupError
from headrace.repository.commands import Commands
from headrace.repository.config import ModelConfig, parse_config
from headrace.repository.policy import Load, next_action
from headrace.repository.private_copy import PrivateCopy, remove_left
from headrace.repository.sandbox import OnnxChecker
from headrace.repository.scan import ModelFolder, VersionFolder, scan
from headrace.repository.snapshot import ChangedMeanwhileError, copy, fingerprint
from headrace.repository.state import Build, Model, ModelEntry, Seen, ServedT
from headrace.repository.validate import MANIFEST_FILENAME, check_manifest

_LOG = structlog.get_logger(__name__)

ControlMode = Literal["poll", "explicit", "none"]
"""Triton's: follow the folder, load and unload on request, or only what is there at the start."""

RETRY_S = 5.0
"""How soon a version is tried again that lacked something outside its files."""

_NO_FILES = ""  # no fingerprint: whatever files are there are not those that failed

CHECKER_IDLE_S = 60.0
"""How long the ONNX checker's process waits for another model: versions often come in a row."""

WATCH_DEBOUNCE_MS = 200
"""Events are collected for so long; copying one file makes hundreds."""


class _StoppedError(Exception):
    """What is being loaded never will be: nobody needs to hear how it failed."""


class RepositoryManager(Generic[ServedT]):
    """
    Loads, swaps and unloads model versions as their folders come, change and go.

    A version is taken once its files have stood still for `settle_s`, or match its manifest. A
    candidate that fails changes nothing but its own state; it is tried again when its files
    change. `load_all`, then `start`, then `stop`.

    Args:
        root: The model repository.
        load: Makes a version ready to `start`, from a private copy of its folder (with
            `config.pbtxt` beside it), or raises `ModelLoadError`. Called by one thread.
        publish: Told of every change, with all models; must swap them in before it returns.
        on_load: Told of every attempt: model, and whether it succeeded.
        revision: Describes what of a model lies outside its files, as a feature service does; its
            versions are loaded anew when that changes.
        mode: What makes versions come and go.
        wanted: Models that were asked for before; `explicit` loads them from the start.
        settle_s: As above.
        poll_s: How often to look without being told of a change.
        retire_timeout_s: Longest that an old version may take to finish what waits.
    """

    def __init__(
        self,
        root: Path,
        *,
        load: Callable[[str, VersionFolder], tuple[ModelConfig, ServedT]],
        publish: Callable[[Sequence[ModelEntry[ServedT]]], None],
        on_load: Callable[[str, bool], None],
        revision: Callable[[ModelConfig], str] = lambda _config: "",
        mode: ControlMode = "poll",
        wanted: Collection[str] = (),
        settle_s: float = 1.0,
        poll_s: float = 5.0,
        retire_timeout_s: float = 30.0,
    ) -> None:
        self._root = root
        self._load = load
        self._publish_entries = publish
        self._on_load = on_load
        self._revision = revision
        self._mode = mode
        self._settle_s = settle_s
        self._poll_s = poll_s
        self._retire_timeout_s = retire_timeout_s
        self._models: dict[str, Model[ServedT]] = {}
        self._wanted: set[str] | None = set(wanted) if mode == "explicit" else None
        self._commands = Commands()
        self._copy: PrivateCopy | None = None
        """Of the version that was loaded last, or is being loaded."""
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._swapping = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="repository", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="repository-watch", daemon=True)
        self._retiring: list[threading.Thread] = []
        self._is_readable = True
        self._checker = OnnxChecker()

    def load_all(self) -> None:
        """
        Load what is there now, without waiting for anything to settle. Before `start`.

        Raises:
            StartupError: the repository is not a folder that can be read.
        """
        folders = scan(self._root)
        remove_left()
        self._bring_in_step(folders, is_settled=True)
        if self._mode == "none":
            self._checker.close()

    def want(self, names: Collection[str]) -> None:
        """
        Load these models and no others, as they lie there now (`explicit` only). As above.

        What has failed before is tried again: somebody asked for it since.
        """
        if self._wanted is not None:
            self._wanted = set(names)
            for name in self._wanted & self._models.keys():
                self._models[name].failed.clear()
            self.load_all()

    def start(self) -> None:
        """Begin to follow the repository."""
        if self._mode != "none":
            self._thread.start()
        if self._mode == "poll":
            self._watcher.start()

    def stop(self, timeout_s: float) -> None:
        """
        Stop following. What serves goes on; what is being loaded never will, and whoever waits for
        it is told at once. A second call waits for longer.
        """
        self._commands.close()  # first: what breaks off is not told as if it were done
        with self._swapping:  # from here on nothing is swapped in
            self._stopping.set()
        self._wake.set()
        deadline_s = time.monotonic() + timeout_s
        for thread in (self._thread, self._watcher, *self._retiring):
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))
        if not self._thread.is_alive():
            self._checker.close()

    def abandon(self) -> bool:
        """
        Stop, and let go of a load that goes on nevertheless. For a process that ends.

        Returns:
            Whether there is one: the interpreter cannot end in peace while it comes back to it.
        """
        self.stop(0)  # a process that failed has not
        if not self._thread.is_alive():
            return False
        self._checker.close()
        if (copy := self._copy) is not None:
            copy.remove()
        return True

    def load(self, name: str, timeout_s: float | None) -> None:
        """
        Load a model as its configuration says, or load it anew if its files have changed.

        Args:
            name: Of its folder.
            timeout_s: Longest to wait for it; None for as long as it takes.

        Raises:
            ModelLoadError: it is not there, or one of its versions cannot be loaded.
            Draining: this is stopping.
            TimeoutError: it takes longer; it goes on.
        """
        self._commands.ask(lambda: self._load_now(name), timeout_s, self._wake.set)

    def unload(self, name: str, timeout_s: float | None) -> None:
        """
        Take a model out of service; requests that wait are finished.

        Args:
            name: Of its folder.
            timeout_s: As for `load`.

        Raises:
            ModelLoadError: no such model.
            Draining: this is stopping.
            TimeoutError: it takes longer; it goes on.
        """
        self._commands.ask(lambda: self._unload_now(name), timeout_s, self._wake.set)

    def look_soon(self) -> None:
        """Look without waiting for the next time: something outside the files has changed."""
        self._wake.set()

    @property
    def mode(self) -> ControlMode:
        """What makes versions come and go."""
        return self._mode

    def _follow(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(self._until_next_look_s())
            self._wake.clear()
            if self._stopping.is_set():
                break
            try:
                self._commands.run()
                if self._mode == "poll":
                    self._look()
            except Exception:  # the next look may do better; what serves goes on
                _LOG.exception("repository_look_failed")
            self._checker.close_when_idle(CHECKER_IDLE_S)
        self._checker.close()

    def _until_next_look_s(self) -> float:
        moving = [
            seen.since_s
            for model in self._models.values()
            for seen in model.seen.values()
            if not seen.is_settled
        ]
        if not moving or not self._is_readable:
            return self._poll_s
        due_s = min(moving) + self._settle_s - time.monotonic()
        return min(self._poll_s, max(0.01, due_s))

    def _watch(self) -> None:
        try:
            for _ in watchfiles.watch(
                self._root,
                watch_filter=None,
                debounce=WATCH_DEBOUNCE_MS,
                stop_event=self._stopping,
                rust_timeout=500,
                raise_interrupt=False,
            ):
                self._wake.set()
        except Exception as error:  # no inotify here, or its limits are used up
            _LOG.warning("repository_watch_failed", error=str(error), polling_s=self._poll_s)

    def _look(self) -> None:
        try:
            folders = scan(self._root)
        except StartupError as error:
            # A network file system may be away for a moment: nothing is taken out of service.
            if self._is_readable:
                _LOG.error("repository_unreadable", reason=str(error))
            self._is_readable = False
            return
        self._is_readable = True
        self._bring_in_step(folders)

    def _load_now(self, name: str) -> None:
        assert self._wanted is not None
        folders = self._scan_for_caller()
        if all(folder.name != name for folder in folders):
            raise ModelLoadError(f"failed to load '{name}', no such model in the repository")
        self._wanted.add(name)
        model = self._models.get(name)
        if model is not None:
            model.failed.clear()
        self._bring_in_step(folders, is_settled=True)
        entry = self._models[name].entry()
        if not entry.versions or entry.failures:
            raise ModelLoadError(f"failed to load '{name}': {'; '.join(entry.failures.values())}")

    def _unload_now(self, name: str) -> None:
        assert self._wanted is not None
        if name not in self._wanted:
            raise ModelLoadError(f"failed to unload '{name}', it is not loaded")
        folders = self._scan_for_caller()
        self._wanted.discard(name)
        self._bring_in_step(folders, is_settled=True)

    def _scan_for_caller(self) -> Sequence[ModelFolder]:
        try:
            return scan(self._root)
        except StartupError as error:  # it names a path
            _LOG.error("repository_unreadable", reason=str(error))
            raise ModelLoadError("the model repository cannot be read") from None

    def _bring_in_step(self, folders: Sequence[ModelFolder], *, is_settled: bool = False) -> None:
        """
        Look at every model, then act until there is nothing left to do.

        Args:
            folders: What there is now.
            is_settled: Take files as they are, without waiting for them to stand still.
        """
        present = {
            folder.name: folder
            for folder in folders
            if self._wanted is None or folder.name in self._wanted
        }
        before = [model.entry() for model in self._models.values()]
        for name in present.keys() - self._models.keys():
            self._models[name] = Model(name)
        for model in self._models.values():
            self._see(model, present.get(model.name), is_settled=is_settled)
        for model in sorted(self._models.values(), key=lambda model: model.name):
            while not self._stopping.is_set() and self._act(model):
                pass
        for model in list(self._models.values()):
            if model.folder is None and not model.builds:
                del self._models[model.name]
        if is_settled or before != [model.entry() for model in self._models.values()]:
            self._publish()

    def _see(self, model: Model[ServedT], folder: ModelFolder | None, *, is_settled: bool) -> None:
        now_s = time.monotonic()
        model.folder = folder
        if folder is not None:
            self._read_config(model, folder)
        on_disk = {} if folder is None else {version.number: version for version in folder.versions}
        for number in on_disk.keys() | model.seen.keys():
            version = on_disk.get(number)
            found = None if version is None else self._fingerprint(model, version)
            seen = model.seen.get(number)
            if seen is None or seen.fingerprint != found:
                seen = Seen(version, found, now_s, is_settled or _matches_manifest(version))
                model.seen[number] = seen
            seen.folder = version
            seen.is_settled |= is_settled or now_s - seen.since_s >= self._settle_s
            if version is None:
                model.failed.pop(number, None)
                if seen.is_settled and number not in model.builds:
                    del model.seen[number]

    def _fingerprint(self, model: Model[ServedT], version: VersionFolder) -> str:
        """Describe a version's files, and what of it lies outside them."""
        files = fingerprint(version.path)
        if model.config is None or model.reason is not None:
            return files
        revision = self._revision(model.config)
        return f"{files} {revision}" if revision else files

    def _read_config(self, model: Model[ServedT], folder: ModelFolder) -> None:
        before, model.reason = model.reason, folder.reason
        if model.reason is None:
            try:
                model.config = parse_config(folder.read_config(), folder.name)
                model.policy = model.config.version_policy
            except ModelLoadError as error:
                model.reason = str(error)
        if model.reason is not None and model.reason != before:
            self._report(model.name, None, model.reason)

    def _act(self, model: Model[ServedT]) -> bool:
        """Carry out one action; say whether there was one."""
        action = next_action(model.policy, model.views())
        if action is None:
            return False
        if not isinstance(action, Load):
            build = model.builds.pop(action.number)
            if model.seen[action.number].fingerprint is None:
                del model.seen[action.number]
            self._publish()
            self._retire(model.name, action.number, build.served)
            return True
        if model.reason is not None:  # an unreadable configuration: what serves goes on
            return False
        seen = model.seen[action.number]
        assert seen.folder is not None
        assert seen.fingerprint is not None
        model.loading = action.number
        self._publish()
        try:
            build = self._build(model, seen.folder, seen.fingerprint)
        except _StoppedError:
            return False
        except ChangedMeanwhileError:
            if self._mode == "poll":
                seen.since_s, seen.is_settled = time.monotonic(), False
                return True
            reason = "its files changed while they were read; load it again"
            self._report_once(model, action.number, seen.fingerprint, reason)
        except NotYetLoadable as error:
            files = seen.fingerprint
            if self._mode == "poll":
                # Not failed with these files: they are looked at again, as if they had just come.
                seen.since_s, seen.is_settled = time.monotonic() + RETRY_S - self._settle_s, False
                files = _NO_FILES
            self._report_once(model, action.number, files, str(error))
        except ModelLoadError as error:
            self._report_once(model, action.number, seen.fingerprint, str(error))
        except Exception:
            _LOG.exception("model_load_crashed", model=model.name, version=action.number)
            model.failed[action.number] = (seen.fingerprint, "internal error; the log says more")
        else:
            return self._swap_in(model, action.number, build)
        finally:
            model.loading = None
        self._on_load(model.name, False)  # noqa: FBT003 the outcome
        self._publish()
        return True

    def _swap_in(self, model: Model[ServedT], number: int, build: Build[ServedT]) -> bool:
        with self._swapping:
            if self._stopping.is_set():
                build.served.close()
                return False
            model.failed.pop(number, None)
            old = model.builds.get(number)
            model.builds[number] = build
            model.loading = None
            build.served.start()
            self._publish()
        _LOG.info("model_loaded", model=model.name, version=number)
        self._on_load(model.name, True)  # noqa: FBT003 the outcome
        if old is not None:
            self._retire(model.name, number, old.served)
        return True

    def _build(self, model: Model[ServedT], version: VersionFolder, seen: str) -> Build[ServedT]:
        if version.reason is not None:
            raise ModelLoadError(version.reason)
        check_manifest(version.path)  # links are refused where they lie, not copied
        try:
            config, served = self._load_copy(model, version, seen)
        except Exception:
            if self._stopping.is_set():  # its copy may be gone, its checker closed
                raise _StoppedError from None
            raise
        return Build(seen, config, served)

    def _load_copy(
        self, model: Model[ServedT], version: VersionFolder, seen: str
    ) -> tuple[ModelConfig, ServedT]:
        try:
            self._copy = PrivateCopy()
        except OSError as error:  # of this process, or its disk; not of the version
            reason = error.strerror or "no reason is known"
            raise NotYetLoadable(f"no private copy can be made: {reason}") from None
        with self._copy as folder:
            path = copy(version.path, folder)
            if self._fingerprint(model, version) != seen:
                raise ChangedMeanwhileError
            if self._stopping.is_set():
                raise _StoppedError
            copied = VersionFolder(version.number, path, has_model=version.has_model)
            if version.has_model:
                self._checker.check(copied.model_path)
            return self._load(model.name, copied)

    def _retire(self, name: str, number: int, served: ServedT) -> None:
        """Let an old version finish, on a thread of its own: it may take its time."""

        def retire() -> None:
            if served.stop(self._retire_timeout_s):
                served.close()
                _LOG.info("model_unloaded", model=name, version=number)
            else:  # it still runs a batch: freeing the model under it would crash
                _LOG.error("model_not_unloaded", model=name, version=number)

        self._retiring = [thread for thread in self._retiring if thread.is_alive()]
        thread = threading.Thread(target=retire, name=f"retire-{name}-{number}", daemon=True)
        self._retiring.append(thread)
        thread.start()

    def _publish(self) -> None:
        models = sorted(self._models.values(), key=lambda model: model.name)
        self._publish_entries([model.entry() for model in models])

    def _report_once(self, model: Model[ServedT], number: int, files: str, reason: str) -> None:
        if model.failed.get(number) != (files, reason):
            self._report(model.name, number, reason)
        model.failed[number] = (files, reason)

    def _report(self, model: str, version: int | None, reason: str) -> None:
        _LOG.error("model_load_failed", model=model, version=version, reason=reason)


def _matches_manifest(version: VersionFolder | None) -> bool:
    """Say whether the files prove themselves complete."""
    if version is None or not (version.path / MANIFEST_FILENAME).is_file():
        return False
    with contextlib.suppress(ModelLoadError):
        check_manifest(version.path)
        return True
    return False
