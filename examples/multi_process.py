"""A small training on several processes, started by one command, and the result that each of them has.

    python examples/multi_process.py --processes 2 --devices 4

Every process reads its own part of the data, and runs the same program. On a cluster there is nothing to start: SLURM,
Kubernetes or the TPU runtime start one process for each host, and ``jax.distributed.initialize()`` finds the others.
"""

import argparse
import os
import socket
import subprocess
import sys


def start(processes: int, devices: int, steps: int) -> int:
    """Start this file again, once for each process, and show what each of them says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    options = ["--processes", str(processes), "--steps", str(steps), "--coordinator", coordinator]
    children = [
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1 : -len(sys.argv)], __file__, *options, "--process", str(process)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(processes)
    ]
    try:
        for process, child in enumerate(children):
            out, errors = child.communicate(timeout=120)
            print(f"process {process}:")
            lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # the transport's own
            print("".join(f"  {line}\n" for line in lines), end="")
            if child.returncode:
                print(errors, file=sys.stderr)
    finally:
        for child in children:
            child.kill()
            child.wait()
    return max(child.returncode for child in children)


def train(processes: int, process: int, coordinator: str, steps: int) -> None:
    """What each process runs."""
    import jax

    jax.distributed.initialize(coordinator, processes, process)

    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from sklearn.datasets import load_digits

    from distributed_metrics import DistributedMetrics, PeriodicFlush
    from distributed_metrics.writers import ConsoleWriter

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    metrics = DistributedMetrics({"loss": ("mean", "max"), "accuracy": "mean", "examples": "count"}, mesh=mesh)

    digits = load_digits()
    images, labels = digits.images.reshape(-1, 64).astype(np.float32) / 16, digits.target.astype(np.int32)
    mine = slice(process, None, processes)  # every process has other examples
    images, labels = images[mine], labels[mine]

    sharded, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    state = jax.jit(lambda: {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}, out_shardings=everywhere)()

    @nnx.jit
    def train_step(metrics, state, images, labels):
        def loss_fn(state):
            logits = images @ state["weights"] + state["bias"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), {"loss": losses, "accuracy": logits.argmax(-1) == labels, "examples": losses}

        (_, seen), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state)
        metrics.update(seen)  # nothing is sent
        return jax.tree.map(lambda x, gradient: x - 0.5 * gradient, state, gradients)

    batch = 8 * jax.local_device_count()
    with PeriodicFlush(metrics, 10, [ConsoleWriter()], timeout=60) as flusher:  # the first process writes
        for step in range(steps):
            chosen = np.random.default_rng((step, process)).choice(len(labels), batch, replace=False)
            x = jax.make_array_from_process_local_data(sharded, images[chosen])
            y = jax.make_array_from_process_local_data(sharded, labels[chosen])
            state = train_step(metrics, state, x, y)
            flusher(step)
        total = flusher.total()
    print(
        f"accuracy {total['accuracy']:.4f} of {total['examples']:.0f} examples, largest loss {total['loss']['max']:.4f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="virtual devices of each process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is None:
        sys.exit(start(options.processes, options.devices, options.steps))
    train(options.processes, options.process, options.coordinator, options.steps)
