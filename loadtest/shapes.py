"""Locust's shape of the test: the stages that `run.py` asked for through the environment.

Without them there is no shape here, and Locust's own flags, or its page, decide.
"""

import os

from locust import LoadTestShape
from stages import SECONDS, SHAPE, USERS, plan

if SHAPE in os.environ:

    class Planned(LoadTestShape):
        """The shape that was asked for."""

        stages = plan(os.environ[SHAPE], int(os.environ[USERS]), float(os.environ[SECONDS]))

        def tick(self) -> tuple[int, float] | None:
            now_s = self.get_run_time()
            for stage in self.stages:
                if now_s < stage.until_s:
                    return stage.users, stage.users
            return None
