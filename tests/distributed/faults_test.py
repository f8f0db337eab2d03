"""A rank that fails, is killed or hangs, or does not fit the others: every rank ends within a bounded time with one line
that names the rank and the cause, the last checkpoint is whole, and the same command goes on from it.

usage: faults_test.py ORYX [unittest arguments]      ORYX_TEST_DEVICE=cuda: over NCCL, on two GPUs
"""

import json
import os
import resource
import signal
import time
import unittest
from pathlib import Path

from ranks import DEVICE, RanksTest, free_port, sentences, write_shards

SECONDS = 4 if DEVICE == "cpu" else 20  # a GPU takes its time to start
QUICK = f"training.timeout_seconds={SECONDS}"
LONG = ("training.steps=4000", "training.checkpoint_every=10", "training.validation_every=0")


class FaultsTest(RanksTest):
    def start_pair(self, run, *overrides, of_one=(), sizes=(2, 2), limits=(None, None)):
        """Ranks 0 and 1, of which rank 1 gets some overrides of its own."""
        port = free_port()
        ranks = []
        for rank in (0, 1):
            ranks.append(self.start_rank(rank, sizes[rank], port, run, *overrides, *(of_one if rank else ()),
                                         preexec_fn=limits[rank]))
        return ranks

    def assert_lines(self, ranks, of_zero, of_one, timeout=60):
        for rank, process in enumerate(ranks):
            self.end(process, timeout)
            self.assert_one_line(process, f"rank {rank} of", *(of_one if rank else of_zero))

    def test_recipes_that_differ(self):
        run = self.root / "recipes"
        said = ("training.learning_rate", "0.004", "0.005")
        self.assert_lines(self.start_pair(run, of_one=("training.learning_rate=0.004",)), ("rank 1 failed", *said), said)
        self.assertFalse(run.exists())

    def test_data_that_differ(self):
        other = self.root / "other"
        write_shards(other, sentences(4000, 9))
        said = ("data.train", "tokens with checksum")
        self.assert_lines(self.start_pair(self.root / "data-run", of_one=(f'data.train=["{other}"]',)),
                          ("rank 1 failed", *said), said)

    def test_a_recipe_that_one_rank_cannot_read(self):
        said = ("training.learning_rat", "learning_rate")
        self.assert_lines(self.start_pair(self.root / "unread", of_one=("training.learning_rat=1",)),
                          ("rank 1 failed", *said), said)

    def test_ranks_that_were_told_different_sizes(self):
        self.assert_lines(self.start_pair(self.root / "sizes", QUICK, sizes=(2, 3)), ("rank 1", "3 ranks", "2 ranks"),
                          ("3 ranks", "2 ranks"))

    def test_a_rank_that_never_comes(self):
        self.assert_lines(self.start_pair(self.root / "missing", QUICK, sizes=(3, 3)),
                          (f"2 of 3 ranks came within {SECONDS} s", "rank 2 did not"), ("rank 0 failed", "rank 2 did not"))

    def test_two_processes_of_one_rank(self):
        port, run = free_port(), self.root / "twins"
        ranks = [self.start_rank(rank, 3, port, run, QUICK) for rank in (0, 1, 1)]
        lines = []
        for process in ranks:
            self.end(process, 60)
            self.assert_one_line(process)
            lines += self.error_lines(process)
        self.assertTrue(any("two processes say that they are rank 1" in line for line in lines), lines)

    def test_fewer_sequences_than_ranks(self):
        said = ("training.batch_tokens = 64", "1 sequence", "2 ranks")
        self.assert_lines(self.start_pair(self.root / "few", "training.batch_tokens=64"), said, said)

    def test_a_directory_that_another_run_holds(self):
        run = self.root / "held"
        holder = self.start(1, run, *LONG)
        self.wait_for_lines(holder, run, 1)
        self.assert_lines(self.start_pair(run, *LONG), ("another process is training",),
                          ("rank 0 failed", "another process is training"))
        holder.kill()
        holder.communicate()

    def test_a_full_disk_on_the_writer(self):
        run = self.root / "disk"
        self.train(2, run, "training.checkpoint_every=8", "training.steps=24")
        self.cut_back(run, 8)
        size = (run / "latest" / "model.safetensors").stat().st_size
        before = os.readlink(run / "latest")

        def small_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

        ranks = self.start_pair(run, "training.checkpoint_every=8", limits=(small_files, None))
        self.assert_lines(ranks, ("model.safetensors",), ("rank 0 failed", "model.safetensors"))
        self.assertEqual(os.readlink(run / "latest"), before)
        self.assertFalse([name for name in os.listdir(run / "checkpoints") if name.endswith(".partial")])
        self.train(2, run, "training.checkpoint_every=8")

    def test_a_loss_that_is_not_finite(self):
        ranks = self.start_pair(self.root / "infinite", "training.learning_rate=1e35", "training.warmup_fraction=0",
                                "training.clip=0", "training.weight_decay=1e5", "data.validation=[]")
        self.assert_lines(ranks, ("step ",), ("step ",))

    def killed(self, name, victim, number, *overrides):
        run = self.root / name
        ranks = self.start_pair(run, *LONG, *overrides)
        self.wait_for_lines(ranks[0], run, 25)
        os.kill(ranks[victim].pid, number)
        return run, ranks, self.end(ranks[1 - victim], 60)

    def test_a_rank_that_is_killed(self):
        run, ranks, left = self.killed("killed-1", 1, signal.SIGKILL)
        self.end(ranks[1])
        self.assert_one_line(left, "rank 0 of 2", "rank 1 is gone")
        self.assertGreaterEqual(json.loads((run / "latest" / "training.json").read_text())["step"], 20)

    def test_a_killed_rank_that_kept_the_store(self):
        _, ranks, left = self.killed("killed-0", 0, signal.SIGKILL)
        self.end(ranks[0])
        self.assert_one_line(left, "rank 1 of 2", "rank 0")

    @unittest.skipIf(DEVICE != "cpu", "a GPU maps more than the limit from the start")
    def test_a_rank_without_memory(self):
        def size(process):
            status = Path(f"/proc/{process.pid}/status").read_text()
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize")) * 1024

        # Rank 1 comes first and waits for the store of rank 0; from then on it gets hardly any memory.
        run, port = self.root / "memory", free_port()
        starved = self.start_rank(1, 2, port, run, *LONG, QUICK)
        before, now = -1, 0
        while before != now:
            before, now = now, size(starved)
            time.sleep(1)
        resource.prlimit(starved.pid, resource.RLIMIT_AS, (now + (4 << 20),) * 2)
        other = self.start_rank(0, 2, port, run, *LONG, QUICK)
        self.end(other, 60)
        self.assert_one_line(other, "rank 0 of 2", "rank 1")
        # Either it could still say so, or it was gone.
        self.assertTrue("rank 1 failed" in other.errors or "rank 1 is gone" in other.errors, other.errors)
        self.assertNotEqual(self.end(starved, 60).returncode, 0)

    def test_a_rank_that_hangs(self):
        for victim in (0, 1):
            _, ranks, left = self.killed(f"hung-{victim}", victim, signal.SIGSTOP, QUICK)
            # The store of a stopped rank 0 does not answer either.
            self.assert_one_line(left, f"rank {1 - victim} of 2", f"rank {victim}")
            os.kill(ranks[victim].pid, signal.SIGCONT)
            self.end(ranks[victim], 60)
            self.assert_one_line(ranks[victim], f"rank {victim} of 2")


if __name__ == "__main__":
    unittest.main()
