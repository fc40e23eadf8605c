"""The process of one worker: a gateway that a supervisor starts, asks and stops."""

import socket
from collections.abc import Callable, Collection, Sequence

import structlog

from headrace.app import Gateway, WorkerPlace, open_gateway
from headrace.errors import StartupError
from headrace.process_end import end_if_held_up
from headrace.settings import ServeSettings, load
from headrace.telemetry.logs import set_log_level, set_up_logs
from headrace.workers.channel import ChannelBrokenError, Message
from headrace.workers.link import SharedRepository, SupervisorLink
from headrace.workers.numbers import Page, page_of


def run_worker(channel_fd: int) -> int:
    """
    Serve as one of several until the supervisor says, or is gone.

    Settings come over the channel, whole: the environment, flags and files were the supervisor's to
    read, and no secret shows in a list of processes.

    Args:
        channel_fd: Inherited, connected to the supervisor.

    Returns:
        The exit code: 0 stopped as asked, 1 failed while running, 2 could not start.

    Raises:
        StartupError: the channel is none.
    """
    try:
        channel = socket.socket(fileno=channel_fd)
        channel.set_inheritable(False)
        link = SupervisorLink(channel)
        start = link.receive_start()
    except (ChannelBrokenError, OSError) as error:
        raise StartupError(f"a worker is started by `headrace serve` only: {error}") from None
    settings = load(ServeSettings, start["settings"])
    set_up_logs(start["log_level"], worker=start["worker"])
    link.start(settings.drain_delay_s + settings.drain_timeout_s)

    def join(want: Callable[[Collection[str]], None]) -> None:
        models_seen = start["models_seen"]

        def catch_up(state: Message) -> None:
            nonlocal models_seen
            set_log_level(state["log_level"])
            if state["models_seen"] != models_seen:  # the repository is looked through
                models_seen = state["models_seen"]
                want(state["loaded"])

        link.join(start, catch_up)

    place = WorkerPlace(
        start["worker"],
        start["loaded"],
        shared=lambda mode: SharedRepository(link, mode),
        join=join,
        change_log_level=lambda level, timeout_s: link.ask("log_level", level, timeout_s),
        leave=link.leave,
    )
    try:
        gateway = open_gateway(settings, place)
    except StartupError as error:
        link.cannot_start(str(error))
        return 2
    served = _Served(gateway)
    code = gateway.run(on_ready=lambda: link.serving(served), asked=link.asked_to_stop)
    link.leave()
    if code:
        structlog.get_logger(__name__).error("worker_failed", exit_code=code)
    end_if_held_up(gateway, code)
    return code


class _Served:
    """A gateway as its supervisor reaches it."""

    def __init__(self, gateway: Gateway) -> None:
        self.is_ready = gateway.is_ready
        self.hurry = gateway.hurry
        self.load = gateway.repository.load
        self.unload = gateway.repository.unload
        self._gateway = gateway

    def serves(self, name: str) -> bool:
        return self._gateway.catalog.is_ready(name)

    def readiness_notes(self) -> Sequence[str]:
        return self._gateway.readiness_notes()

    def numbers(self) -> Page:
        return page_of(self._gateway.metrics.collect())
