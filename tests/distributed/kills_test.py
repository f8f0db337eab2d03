"""kill -9 of a random rank at random moments, of starting, training and saving, under torchrun: the same command, given
again, ends the run as if nothing had happened.

usage: kills_test.py ORYX [unittest arguments]      ORYX_KILLS: how often (5), ORYX_SEED: of the draws (0)
"""

import os
import random
import signal
import time
import unittest

from ranks import RanksTest

KILLS = int(os.environ.get("ORYX_KILLS", "5"))
SEED = int(os.environ.get("ORYX_SEED", "0"))
OVERRIDES = ("training.checkpoint_every=3", "training.validation_every=20", "training.shard_optimizer=true")
STEPS = 30 * KILLS


class KillsTest(RanksTest):
    def test_kills_at_random_moments(self):
        ranks = 2
        undisturbed, run = self.root / "undisturbed", self.root / "killed"
        self.train(ranks, undisturbed, *OVERRIDES, steps=STEPS)
        draw = random.Random(SEED)
        kills = 0
        while kills < KILLS:
            process = self.start(ranks, run, *OVERRIDES, steps=STEPS)
            victim = draw.randrange(ranks)
            while process.poll() is None and victim not in self.workers(process):
                time.sleep(0.01)
            if draw.random() < 0.25:  # while it starts
                time.sleep(draw.uniform(0, 2))
            else:  # while it trains, checks or saves: a few steps on from the last time
                self.wait_for_lines(process, run, int(STEPS * (kills + draw.random()) / (KILLS + 1)))
                time.sleep(draw.uniform(0, 0.05))
            worker = self.workers(process).get(victim)
            self.assertIsNotNone(worker, "it ended before it could be killed")
            os.kill(worker, signal.SIGKILL)
            self.end(process)
            self.assertNotEqual(process.returncode, 0)
            kills += 1
            lines = self.error_lines(process)
            self.assertLessEqual(len(lines), ranks - 1, process.errors)
            for line in lines:
                self.assertIn(f"rank {victim}", line)
        self.train(ranks, run, *OVERRIDES, steps=STEPS)
        self.assert_same_bytes(run, undisturbed)


if __name__ == "__main__":
    unittest.main()
