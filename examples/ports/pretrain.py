"""Pretraining of a mixture of experts in the shape of MaxText: an Auto mesh, and ``jax.jit`` compiled ahead of time.

By hand, as in MaxText, microbatches are added up (balance loss and activation norms are MICRO times too large), norms
and tokens include padding, the loss the balance loss, and one step of EVERY is logged. Ours see all real tokens.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from comparison import Numbers, compare
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Mean, PeriodicFlush, Snapshot, collective_bytes
from distributed_metrics.writers import ConsoleWriter, MemoryWriter

STEPS, EVERY, MICRO, BATCH, SEQ, VOCAB, WIDTH = 20, 5, 4, 8, 16, 64, 32  # two layers, of two experts each
PEAK = 1e10 / (6 * 2 * 4 * WIDTH**2)  # tokens per second, of a nominal peak: virtual devices have none
MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2, 1), ("data", "fsdp", "context", "tensor"))
TOKENS = P(("data", "fsdp"), "context")  # how (batch, sequence) lies
REPLICATED, FSDP, MICROBATCHES = (NamedSharding(MESH, spec) for spec in (P(), P(None, "fsdp"), P(None, *TOKENS)))
SHAPES = {"embed": (VOCAB, WIDTH), "router": (2, WIDTH, 2), "up": (2, WIDTH, 2, WIDTH), "down": (2, WIDTH, 2, WIDTH)}
ADAM = optax.adam(SCHEDULE := optax.warmup_cosine_decay_schedule(0.0, 1e-2, 4, STEPS))
SPEC = {"loss": "ratio", "tokens": "sum", "balance": "mean", "norm": Mean(shape=2), "lr": "last"}


def init_state() -> dict:
    """Parameters, the state of the optimizer, and our metrics: what a step takes and gives back."""
    params = {n: jnp.float32(np.random.default_rng([*n.encode()]).normal(0, 0.2, s)) for n, s in SHAPES.items()}
    return {"params": params, "adam": ADAM.init(params), "metrics": DistributedMetrics(SPEC, mesh=MESH)}


def loss_fn(params: dict, batch: dict) -> tuple[jax.Array, dict]:
    """The objective of a microbatch, not yet divided by its tokens, and the values to log."""
    x = jax.lax.with_sharding_constraint(params["embed"][batch["tokens"]], NamedSharding(MESH, TOKENS))
    mask, norms, balance = batch["mask"], [], jnp.float32(0)
    for router, up, down in zip(params["router"], params["up"], params["down"], strict=True):
        gates = jax.nn.softmax(x @ router)
        x += jnp.einsum("bsef,fed,bse->bsd", jax.nn.relu(jnp.einsum("bsd,def->bsef", x, up)), down, gates)
        norms.append(jnp.linalg.norm(x, axis=-1))
        balance += 0.1 * (gates.mean(axis=(0, 1)) ** 2).sum()
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["embed"].T, batch["targets"]) * mask
    values = {"loss": (losses, mask), "tokens": mask, "balance": balance, "norm": jnp.stack(norms, axis=-1)}
    return losses.sum() + balance * mask.sum(), values


def train_step(state: dict, batch: dict) -> tuple[dict, dict, dict]:
    """One update of the parameters. Returns the state, what is logged by hand, and all values, for NumPy."""

    def microbatch(carry: tuple, part: dict) -> tuple[tuple, tuple]:
        gradients, metrics = carry
        new, values = jax.grad(loss_fn, has_aux=True)(state["params"], part)
        values["lr"] = SCHEDULE(state["adam"][0].count)
        if metrics is not None:
            metrics.update(values, weight={"norm": part["mask"]}, spec=TOKENS)  # ours
        aux = {"xent": values["loss"][0].sum(), "tokens": part["mask"].sum(), "balance": values["balance"]}  # by hand
        aux |= {f"norm/{layer}": values["norm"][..., layer].mean() for layer in range(2)}  # by hand
        return (jax.tree.map(jnp.add, gradients, new), metrics), (aux, values)

    carry = jax.tree.map(jnp.zeros_like, state["params"]), state["metrics"]
    (gradients, metrics), (aux, values) = jax.lax.scan(microbatch, carry, batch)
    aux = jax.tree.map(lambda x: jnp.sum(x, axis=0), aux)  # by hand, a line of MaxText
    loss = aux["xent"] / aux["tokens"] + aux["balance"] / MICRO
    aux |= {"loss": loss, "perplexity": jnp.exp(loss), "lr": SCHEDULE(state["adam"][0].count)}
    updates, adam = ADAM.update(jax.tree.map(lambda g: g / aux["tokens"], gradients), state["adam"])
    return {"params": optax.apply_updates(state["params"], updates), "adam": adam, "metrics": metrics}, aux, values


def batch_of(step: int) -> dict:
    """Padded documents; the later microbatches have the longer ones."""
    tokens = np.random.default_rng(step).choice([1, 7], (MICRO, BATCH, SEQ + 1)).cumsum(axis=-1) % VOCAB
    lengths = np.random.default_rng(step).integers(1, 4 * np.arange(1, 1 + MICRO)[:, None, None], (MICRO, BATCH, 1))
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "mask": np.arange(SEQ) < lengths}
    return jax.device_put(batch, MICROBATCHES)


def derive(numbers: dict, window: Snapshot) -> dict:
    """Perplexity and model FLOP utilisation of a window; a loss that is not finite ends the run."""
    if not np.isfinite(numbers["loss"]):
        raise FloatingPointError(f"the loss is {numbers['loss']}")
    rates = {"mfu": numbers["tokens_per_sec"] / PEAK} if "tokens_per_sec" in numbers else {}  # not of the first window
    return {"perplexity": np.exp(numbers["loss"]), **rates}


def main() -> None:
    """Train, and compare the numbers of the last window.

    Raises:
        SystemExit: ours are not those of NumPy, or cost a collective.
    """
    abstract = jax.eval_shape(init_state)
    adam = abstract["adam"][0]._replace(count=REPLICATED, mu=FSDP, nu=FSDP), REPLICATED
    lies = {"params": FSDP, "adam": adam, "metrics": abstract["metrics"].sharding}
    jitted = jax.jit(train_step, in_shardings=(lies, MICROBATCHES), out_shardings=(lies, None, None), donate_argnums=0)
    compiled = jitted.lower(abstract, batch_of(0)).compile()
    state, raw, memory, console = jax.jit(init_state, out_shardings=lies)(), [], MemoryWriter(), ConsoleWriter()
    with PeriodicFlush(state["metrics"], EVERY, [memory, console], rates=["tokens"], derive=derive) as flusher:  # ours
        for step in range(STEPS):
            state, aux, values = compiled(state, batch_of(step))
            flusher(step, state["metrics"])  # ours
            if (step + 1) % EVERY == 0:  # by hand
                logged = jax.device_get(aux) | {"tokens": EVERY * MICRO * BATCH * SEQ}
            raw.append(jax.device_get(values))
    x = jax.tree.map(lambda *steps: np.stack(steps).astype(np.float64), *raw[-EVERY:])
    norm = np.average(x["norm"].reshape(-1, 2), axis=0, weights=x["tokens"].ravel())
    exact = {"loss": x["loss"][0].sum() / x["tokens"].sum(), "tokens": x["tokens"].sum(), "lr": x["lr"][-1, -1]}
    exact |= {"norm/0": norm[0], "norm/1": norm[1], "balance": x["balance"].mean(), "perplexity": np.exp(exact["loss"])}
    step_fn = jax.jit(lambda *args: train_step(*args)[0])  # without what is logged by hand
    bare, full = (collective_bytes(step_fn, given, batch_of(0)) for given in (state | {"metrics": None}, state))
    ours = {name: series["value"][-1] for name, series in memory.to_dict().items()}
    compare(bare, full, {name: Numbers(logged[name], ours[name], exact[name]) for name in exact})


if __name__ == "__main__":
    main()
