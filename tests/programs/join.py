"""Joins this process to the others: python PROGRAM RANK PROCESSES PORT ..., each with DEVICES devices."""

import os
import sys

rank, processes, port = map(int, sys.argv[1:4])
devices = int(os.environ.setdefault("DEVICES", "2"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_timeout_seconds=20"

import jax

jax.distributed.initialize(
    f"127.0.0.1:{port}",
    processes,
    rank,
    cluster_detection_method="deactivate",
    initialization_timeout=30,
    heartbeat_timeout_seconds=20,  # a process is silent for up to half of it, and counts as gone so much earlier
    shutdown_timeout_seconds=10,
)
