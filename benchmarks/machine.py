"""What a measurement ran on, and how fast this machine reads memory."""

import os
import pathlib
import platform
import subprocess
import tempfile

STREAM = r"""
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
  const size_t count = (size_t)1 << 27; /* 1 GiB of 8-byte words */
  uint64_t *data = aligned_alloc(1 << 21, count * sizeof *data);
  if (!data) return 1;
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < count; ++i) data[i] = i;
  double best = 1e9;
  uint64_t total = 0;
  for (int run = 0; run < 8; ++run) {
    const double begin = omp_get_wtime();
#pragma omp parallel for simd schedule(static) reduction(+ : total)
    for (size_t i = 0; i < count; ++i) total += data[i];
    const double seconds = omp_get_wtime() - begin;
    if (seconds < best) best = seconds;
  }
  fprintf(stderr, "%llu\n", (unsigned long long)total); /* the sum is used: the loop stays */
  printf("%.0f\n", count * sizeof *data / best);
  return 0;
}
"""


def read_bandwidth():
    """Bytes a second of a streaming read by all cores, the best of eight passes over 1 GiB."""
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "stream"
        subprocess.run(["cc", "-O3", "-march=native", "-fopenmp", "-x", "c", "-", "-o", program],
                       input=STREAM.encode(), check=True)
        return float(subprocess.run([program], capture_output=True, check=True).stdout)


def describe():
    processor = next((line.partition(":")[2].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.machine())
    memory = int(pathlib.Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return dict(processor=processor, cores=len(os.sched_getaffinity(0)), memory_gib=round(memory, 1),
                load_at_start=os.getloadavg()[0], system=platform.platform())


def commit():
    """The commit of the checkout this file lies in, marked where files differ from it."""
    here = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
