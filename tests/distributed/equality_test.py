"""Several ranks under torchrun train what one rank trains: the same losses and weights but for the order of sums, the
same bits on repeat, checkpoints that any number of ranks go on from, optimizer state whole or in parts.

usage: equality_test.py ORYX [unittest arguments]      ORYX_TEST_DEVICE=cuda: over NCCL, on two GPUs
"""

import json
import shutil
import signal
import subprocess
import unittest

from safetensors.numpy import load_file

from ranks import (CLOSE, DEVICE, EXACT, EXACT_TOLERANCE, MANY, ORYX, STEPS, TORCHRUN, RanksTest, free_port,
                   plain_environment)

SHARDED = "training.shard_optimizer=true"
EXACTLY = f"training.dtype={EXACT}"
BFLOAT16 = "training.dtype=bfloat16"
COUNTS = sorted({2, MANY})


class EqualityTest(RanksTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.one = cls.root / "one"
        cls.one_exact = cls.root / "one-exact"
        cls.many = cls.root / "many"
        cls.output = cls.train(cls("run"), 1, cls.one)
        cls.train(cls("run"), 1, cls.one_exact, EXACTLY)
        cls.train(cls("run"), MANY, cls.many)

    def copy(self, run, name, step):
        shutil.copytree(run, self.root / name, symlinks=True)
        self.cut_back(self.root / name, step)
        return self.root / name

    def test_several_ranks_equal_one(self):
        self.assertEqual(self.output["steps"], STEPS)
        self.assert_close(self.many, self.one, CLOSE)
        for ranks in COUNTS:  # 5 sequences: shares of 2 and 3, and of 1, 1, 1 and 2
            run = self.root / f"exact-{ranks}"
            output = self.train(ranks, run, EXACTLY)
            self.assertEqual(set(output["validation_loss"]), {"attention", "linear"})
            self.assert_close(run, self.one_exact, EXACT_TOLERANCE)

    def test_repeat_is_the_same_to_the_bit(self):
        run = self.root / "again"
        self.train(MANY, run)
        self.assert_same_bytes(run, self.many)

    def test_parts_of_the_optimizer_equal_the_whole(self):
        for ranks in COUNTS:
            run = self.root / f"sharded-{ranks}"
            self.train(ranks, run, EXACTLY, SHARDED)
            self.assert_close(run, self.one_exact, EXACT_TOLERANCE)

    def test_masters_in_parts_equal_the_whole(self):
        """In bfloat16 each rank has float32 weights of its parts alone, and nothing is rounded otherwise than before."""
        whole, parts = [], []
        for ranks in COUNTS:
            for runs, overrides in ((whole, ()), (parts, (SHARDED,))):
                runs.append(self.root / f"bfloat16-{ranks}-{len(overrides)}")
                self.train(ranks, runs[-1], BFLOAT16, *overrides)
            self.assert_same_weights(parts[-1], whole[-1])
            self.assert_close(parts[-1], whole[-1], 1e-12)  # the norm of gradients is summed in another order
        # A checkpoint says nothing of it either: what was begun in parts goes on as what was not.
        for ranks, *overrides in ((1,), (2, SHARDED)):
            begun_whole = self.copy(whole[-1], f"bfloat16-whole-{ranks}", 12)
            begun_in_parts = self.copy(parts[-1], f"bfloat16-parts-{ranks}", 12)
            self.train(ranks, begun_whole, BFLOAT16)
            self.train(ranks, begun_in_parts, BFLOAT16, *overrides)
            self.assert_same_weights(begun_in_parts, begun_whole)

    def test_the_other_mixer_in_parts(self):
        one, two = self.root / "delta-one", self.root / "delta-two"
        self.train(1, one, EXACTLY, mixer="gated_delta")
        self.train(2, two, EXACTLY, SHARDED, "training.recompute=layers", mixer="gated_delta")
        # How much is kept for backward changes no weight; the recipe differs in that alone.
        self.assert_close(two, one, EXACT_TOLERANCE)

    def test_any_number_of_ranks_goes_on(self):
        for ranks, *overrides in dict.fromkeys([(1,), (2,), (2, SHARDED), (MANY, SHARDED)]):  # MANY may be 2
            run = self.copy(self.many, f"from-many-{ranks}-{len(overrides)}", 12)
            self.train(ranks, run, *overrides)
            self.assert_close(run, self.one, CLOSE)
            if (ranks, overrides) == (1, []):  # and back: from one to many, in parts, to the end
                run = self.copy(run, "back-to-many", 16)
                self.train(MANY, run, SHARDED)
                self.assert_close(run, self.one, CLOSE)

    def test_going_on_with_as_many_ranks_is_the_same_to_the_bit(self):
        run = self.copy(self.many, "resumed", 8)
        self.train(MANY, run)
        self.assert_same_bytes(run, self.many)

    def test_sigterm_saves_on_all_ranks_and_the_run_goes_on(self):
        run = self.root / "terminated"
        process = self.start(2, run)
        self.wait_for_lines(process, run, 6)
        process.send_signal(signal.SIGTERM)
        self.end(process)
        self.assertEqual(self.error_lines(process), [], process.errors)
        saved = json.loads((run / "latest" / "training.json").read_text())["step"]
        self.assertEqual(saved, max(line["step"] for line in self.metrics(run) if line["kind"] == "train"))
        self.assertLess(saved, STEPS)
        self.train(2, run)
        self.assert_close(run, self.one, CLOSE)

    def test_variables_of_slurm_and_open_mpi(self):
        two = self.root / "two"
        self.train(2, two)
        for launcher in ("slurm", "open-mpi"):
            run, port, ranks = self.root / launcher, free_port(), []
            for rank in (0, 1):
                variables = {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank, "SLURM_JOB_ID": 77,
                             "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
                if launcher == "open-mpi":
                    variables = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
                                 "OMPI_COMM_WORLD_LOCAL_SIZE": 2, "MASTER_PORT": port}
                ranks.append(self.start_rank(rank, 2, port, run, environment=variables))
            for process in ranks:
                self.assertEqual(self.end(process).returncode, 0, process.errors)
            self.assert_same_bytes(run, two)

    def test_inspect_says_what_a_rank_holds(self):
        def bytes_in(name, matrices_only=False):
            tensors = load_file(self.one / "latest" / name)
            # Convolutions, of four taps, are no operands of products.
            return sum(tensor.nbytes for tensor in tensors.values()
                       if not matrices_only or (tensor.ndim == 2 and tensor.shape[1] != 4))

        weights, moments = bytes_in("model.safetensors"), bytes_in("optimizer.safetensors")
        matrices = bytes_in("model.safetensors", matrices_only=True)
        for ranks, *overrides in ((1,), (4,), (4, BFLOAT16), (4, SHARDED), (4, SHARDED, BFLOAT16)):
            command = self.command(self.root / "inspected", "--ranks", str(ranks), *overrides)
            done = subprocess.run([command[0], "inspect", *command[2:]], capture_output=True, text=True, timeout=60)
            self.assertEqual(done.returncode, 0, done.stderr)
            said = json.loads(done.stdout)["bytes_per_rank"]
            rounded = SHARDED in overrides and BFLOAT16 in overrides
            self.assertEqual(said["weights"], weights - (matrices // 2 if rounded else 0))
            self.assertEqual(said["gradients"], weights)
            expected_moments = moments / (4 if SHARDED in overrides else 1)
            self.assertLessEqual(abs(said["moments"] - expected_moments), 0.1 * moments / ranks * (SHARDED in overrides))
            expected_masters = matrices / 4 if rounded else 0
            self.assertLessEqual(abs(said["masters"] - expected_masters), 0.1 * expected_masters)

    def test_benchmark_of_a_step_times_the_exchange(self):
        for overrides in ((), ("--shard-optimizer",)):
            recipe = self.command(self.root / "benchmarked")[2]
            command = [str(TORCHRUN), "--standalone", "--nproc-per-node", "2", "--no-python", str(ORYX), "benchmark", "train",
                       recipe, "--batch", "1", "--length", "64", "--repeats", "2", "--device", DEVICE, "--json", *overrides]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=plain_environment())
            self.assertEqual(done.returncode, 0, done.stderr)
            said = json.loads(done.stdout)  # rank 0 alone speaks
            self.assertEqual(said["ranks"], 2)
            for suffix in ("", "_begun_after"):
                self.assertGreater(said["exchange_wait_seconds" + suffix], 0)
                self.assertGreater(said["step_seconds" + suffix], said["exchange_wait_seconds" + suffix])

    def test_one_rank_under_torchrun_is_a_process_on_its_own(self):
        run = self.root / "alone"
        process = self.end(self.start_rank(0, 1, 1, run, environment={"RANK": 0, "WORLD_SIZE": 1}))
        self.assertEqual(process.returncode, 0, process.errors)
        self.assert_same_bytes(run, self.one)


if __name__ == "__main__":
    unittest.main()
