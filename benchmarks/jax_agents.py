"""TD3+BC and IQL in compiled JAX, as research code for speed writes them: a contestant of `agent_update`.

Plain functions of a state (a dict of parameters, Adam's moments and a key); K updates, each on a fresh batch gathered
from the data, are one `lax.scan` in one compiled function whose state is donated. Same sizes, losses and optimiser as
`plain_agents`. Variants were measured for the fastest: one array per field is faster than packed rows, and two separate
critics are not slower than stacked ones.

XLA's thread pool is told to use one thread; importing this module sets that for the process, before JAX starts.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DISCOUNT, TAU, RATE, BATCH, HIDDEN = 0.99, 0.005, 3e-4, 256, (256, 256)
STEPS = 1_000_000  # over which IQL's actor's learning rate falls
State = dict[str, Any]


def network(weights: np.ndarray, sizes: tuple[int, ...], layer_norm: bool = False) -> list[dict]:
    """Layers from flat weights: of each weight (out, in), bias, and of a hidden layer's norm scale and shift."""
    layers, at = [], 0
    for index, (ins, outs) in enumerate(pairwise(sizes)):
        parts = {"w": (outs, ins), "b": (outs,)}
        if layer_norm and index < len(sizes) - 2:
            parts |= {"scale": (outs,), "shift": (outs,)}
        layer = {}
        for name, shape in parts.items():
            layer[name] = jnp.asarray(weights[at : at + int(np.prod(shape))].reshape(shape))
            at += int(np.prod(shape))
        layers.append(layer | {"w": layer["w"].T})
    return layers


def flat(layers: list[dict]) -> np.ndarray:
    """The inverse of `network`."""
    parts = [(layer[name], name) for layer in layers for name in ("w", "b", "scale", "shift") if name in layer]
    return np.concatenate([np.asarray(values.T if name == "w" else values).ravel() for values, name in parts])


def mlp(layers: list[dict], x: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        x = x @ layer["w"] + layer["b"]
        if "scale" in layer:
            mean = x.mean(-1, keepdims=True)
            x = (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
            x = x * layer["scale"] + layer["shift"]
        x = jax.nn.relu(x)
    return x @ layers[-1]["w"] + layers[-1]["b"]


def q(critic: list[dict], observations: jax.Array, actions: jax.Array) -> jax.Array:
    return mlp(critic, jnp.concatenate([observations, actions], -1))[:, 0]


def moments(parameters: Any) -> dict:
    return {"m": jax.tree.map(jnp.zeros_like, parameters), "v": jax.tree.map(jnp.zeros_like, parameters), "t": 0.0}


def adam(parameters: Any, gradients: Any, state: dict, rate: Any = RATE) -> tuple[Any, dict]:
    t = state["t"] + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], gradients)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state["v"], gradients)
    one, two = 1 - 0.9**t, 1 - 0.999**t
    step = jax.tree.map(lambda p, m, v: p - rate * (m / one) / (jnp.sqrt(v / two) + 1e-8), parameters, m, v)
    return step, {"m": m, "v": v, "t": t}


def soft_update(target: Any, parameters: Any) -> Any:
    return jax.tree.map(lambda t, p: t + TAU * (p - t), target, parameters)


def td3_bc_state(actor: list[dict], critics: list[list[dict]]) -> State:
    copy = partial(jax.tree.map, jnp.copy)
    return {"actor": actor, "critics": critics, "target_actor": copy(actor), "target_critics": copy(critics),
            "actor_moments": moments(actor), "critic_moments": moments(critics)}  # fmt: skip


def td3_bc_critics(state: State, batch: tuple, noise: jax.Array) -> State:
    """One update of the critics; noise is standard normal, as the actions."""
    observations, actions, rewards, next_observations, terminations = batch
    next_actions = jnp.tanh(mlp(state["target_actor"], next_observations)) + jnp.clip(0.2 * noise, -0.5, 0.5)
    next_actions = jnp.clip(next_actions, -1, 1)
    next_q = jnp.minimum(*(q(critic, next_observations, next_actions) for critic in state["target_critics"]))
    target = rewards + DISCOUNT * (1 - terminations) * next_q

    def loss(critics: list) -> jax.Array:
        return sum(((q(critic, observations, actions) - target) ** 2).mean() for critic in critics)

    critics, new = adam(state["critics"], jax.grad(loss)(state["critics"]), state["critic_moments"])
    return state | {"critics": critics, "critic_moments": new}


def td3_bc_actor(state: State, batch: tuple) -> State:
    """One update of the actor and all targets."""
    observations, actions, *_ = batch

    def loss(actor: list[dict]) -> jax.Array:
        policy = jnp.tanh(mlp(actor, observations))
        value = q(state["critics"][0], observations, policy)
        weight = lax.stop_gradient(2.5 / jnp.abs(value).mean())
        return -weight * value.mean() + ((policy - actions) ** 2).mean()

    actor, new = adam(state["actor"], jax.grad(loss)(state["actor"]), state["actor_moments"])
    targets = {"target_actor": soft_update(state["target_actor"], actor),
               "target_critics": soft_update(state["target_critics"], state["critics"])}  # fmt: skip
    return state | {"actor": actor, "actor_moments": new, **targets}


def iql_state(actor: list[dict], value: list[dict], critics: list[list[dict]], action_size: int) -> State:
    trained = {"actor": actor, "log_std": jnp.zeros(action_size, actor[0]["w"].dtype), "value": value,
               "critics": critics}  # fmt: skip
    return {**trained, "target_critics": jax.tree.map(jnp.copy, critics), "moments": moments(trained)}


def iql_update(state: State, batch: tuple) -> State:
    """One update of everything, all losses taken at the weights before it."""
    observations, actions, rewards, next_observations, terminations = batch
    target_q = jnp.minimum(*(q(critic, observations, actions) for critic in state["target_critics"]))
    target = rewards + DISCOUNT * (1 - terminations) * mlp(state["value"], next_observations)[:, 0]

    def loss(parts: State) -> jax.Array:
        advantage = target_q - mlp(parts["value"], observations)[:, 0]
        value_loss = (jnp.abs(0.7 - (advantage < 0)) * advantage**2).mean()
        critic_loss = sum(((q(critic, observations, actions) - target) ** 2).mean() for critic in parts["critics"])
        weight = jnp.minimum(jnp.exp(3.0 * lax.stop_gradient(advantage)), 100.0)
        log_std = jnp.clip(parts["log_std"], -20, 2)
        error = (actions - jnp.tanh(mlp(parts["actor"], observations))) / jnp.exp(log_std)
        log_likelihood = (-0.5 * error**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
        return value_loss + critic_loss - (weight * log_likelihood).mean()

    parts = {name: state[name] for name in ("actor", "log_std", "value", "critics")}
    decay = 0.5 * (1 + jnp.cos(jnp.pi * state["moments"]["t"] / STEPS))
    rates = {name: RATE * decay if name in ("actor", "log_std") else RATE for name in parts}
    gradients, t = jax.grad(loss)(parts), state["moments"]["t"]
    new, after = {}, {"m": {}, "v": {}, "t": t + 1}
    for name, rate in rates.items():
        own = {"m": state["moments"]["m"][name], "v": state["moments"]["v"][name], "t": t}
        new[name], moved = adam(parts[name], gradients[name], own, rate)
        after["m"][name], after["v"][name] = moved["m"], moved["v"]
    return state | new | {"moments": after, "target_critics": soft_update(state["target_critics"], new["critics"])}


def contestant(
    name: str, fields: list[np.ndarray], layer_norm: bool, updates: int, seeds: int = 1
) -> Callable[[], int]:
    """K updates on each call, of one agent or of several by `vmap`, each on batches of its own."""
    data, (observation_size, action_size) = [jnp.asarray(field) for field in fields], (f.shape[1] for f in fields[:2])
    pair, per_step = observation_size + action_size, 2 if name == "TD3+BC" else 1

    def start(seed: int) -> State:
        generator = np.random.default_rng(seed)

        def fresh(ins: int, outs: int, norm: bool = False) -> list[dict]:
            sizes = (ins, *HIDDEN, outs)
            parts = []
            for index, (a, b) in enumerate(pairwise(sizes)):
                parts += [generator.uniform(-(a**-0.5), a**-0.5, (a + 1) * b)]
                parts += [np.ones(b), np.zeros(b)] if norm and index < len(HIDDEN) else []
            return network(np.concatenate(parts).astype(np.float32), sizes, norm)

        critics, actor = [fresh(pair, 1, layer_norm) for _ in range(2)], fresh(observation_size, action_size)
        if name == "TD3+BC":
            state = td3_bc_state(actor, critics)
        else:
            state = iql_state(actor, fresh(observation_size, 1), critics, action_size)
        return state | {"key": jax.random.key(seed)}

    def step(state: State, _: None) -> tuple[State, None]:
        key, rows_key, noise_key = jax.random.split(state["key"], 3)
        rows = jax.random.randint(rows_key, (per_step, BATCH), 0, len(data[0]))
        batches = [tuple(field[rows[k]] for field in data) for k in range(per_step)]
        if name == "TD3+BC":
            noise = jax.random.normal(noise_key, (per_step, BATCH, action_size))
            for k, batch in enumerate(batches):
                state = td3_bc_critics(state, batch, noise[k])
            state = td3_bc_actor(state, batches[-1])
        else:
            state = iql_update(state, batches[0])
        return state | {"key": key}, None

    def run(state: State) -> State:
        return lax.scan(step, state, None, length=updates // per_step)[0]

    compiled = jax.jit(run if seeds == 1 else jax.vmap(run), donate_argnums=0)
    states = [jax.tree.map(jnp.asarray, start(seed)) for seed in range(seeds)]
    held = [states[0] if seeds == 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *states)]

    def work() -> int:
        held[0] = jax.block_until_ready(compiled(held[0]))
        return updates * seeds

    return work
