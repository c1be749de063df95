"""Every benchmark runs, at its smallest size; what it measures there means nothing."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_world_model
import torch
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks import ablation, agent_update, end_to_end, growth, measure, memory, synthesis
from benchmarks.agent_update import random_data
from benchmarks.plain_agents import PlainBuffer, PlainIQL, PlainTD3BC
from dawm.agents import IQL, TD3BC
from dawm.cli.main import make_parser
from dawm.synthesis import rollouts


@pytest.mark.parametrize("script", benchmarks.QUICK, ids=lambda script: script.__name__)
def test_every_benchmark_runs_and_writes_its_results(script, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        headlines = script.main(benchmarks.QUICK[script].split())
    finally:
        torch.set_num_threads(threads)
    assert all(float(ratio) > 0 for _, ratio in headlines)
    if script is agent_update:
        assert any("x plain PyTorch" in what for what, _ in headlines)
    (written,) = tmp_path.glob("*.md")
    assert written.name.startswith(script.__name__.removeprefix("benchmarks.").replace("_", "-"))


def test_all_benchmarks_end_in_one_table(monkeypatch, capsys):
    assert len(benchmarks.QUICK) == 6
    for script in benchmarks.QUICK:
        monkeypatch.setattr(script, "main", lambda arguments: [(f"ours x plain: {arguments[0]}", "2.00")])
    benchmarks.main(["--quick"])
    printed = capsys.readouterr().out
    assert printed.count("2.00") == len(benchmarks.QUICK)
    assert "--updates" in printed


def test_the_samplers_are_judged_on_a_runs_held_out_segments(dataset, monkeypatch):
    results = {"stages": {"world_model": {"checkpoint": ""}}, "data": {"dataset": dataset}, "seed": 0}
    monkeypatch.setattr(synthesis, "read_results", lambda run: results)
    monkeypatch.setattr(synthesis, "load_module", lambda path: small_world_model.model())
    model, segments = synthesis.held_out(Path())
    assert segments.valid.all()
    assert synthesis.quality(model, segments, model.sampler)[1] > 0


def test_the_command_in_a_results_file_has_every_option():
    options = argparse.Namespace(rows=[1, 20], run=None, seeds=3, quick=False)
    assert measure.command_of(growth.__doc__, options) == "python -m benchmarks.growth --rows 1 20 --seeds 3"


@pytest.mark.parametrize("name", memory.WORK)
def test_what_the_memory_benchmark_measures(name, monkeypatch, capsys):
    monkeypatch.setattr(memory, "STARTS", 32)
    monkeypatch.setattr(rollouts, "CHUNK_ON_CPU", rollouts.CHUNK_ON_CPU)  # so that it comes back
    memory.measured(name, keep=False, seconds=0.001)
    rate, pages = map(float, capsys.readouterr().out.split())
    assert rate > 0
    assert pages >= 0


def test_each_arm_of_the_ablation_changes_one_part(tmp_path):
    parser = make_parser()

    def settings(method):
        arguments = [option for path in [*ablation.SHARED, *method.split("+")] for option in ("--config", str(path))]
        fit = parser.parse_args(["fit", *arguments]).fit.as_dict()
        return {key: fit[key] for key in ("horizon", "data", "agent", "stages")}

    base, *arms = map(settings, ablation.write_arms(list(ablation.PARTS), tmp_path))
    assert all(sum(arm[key] != base[key] for key in base) >= 1 for arm in arms)
    assert len({json.dumps(arm, default=str) for arm in [base, *arms]}) == 1 + len(arms)
    (imagining, _), (other, _) = (each["stages"]["agent"]["callbacks"] for each in (base, arms[0]))
    changed = [key for key, value in imagining["init_args"].items() if other["init_args"][key] != value]
    assert changed == ["labels"]
    (endless,) = (arm for arm in arms if "Endless" in arm["stages"]["agent"]["callbacks"][0]["class_path"])
    assert endless["stages"]["agent"]["callbacks"][0]["init_args"] == imagining["init_args"]


def test_the_ablation_draws_what_is_finished(tmp_path):
    for arm in ("aw+dawm-plus", "aw+dawm-plus+labels-imagined"):
        (tmp_path / arm / "data").mkdir(parents=True)
        (tmp_path / arm / "data" / "0.json").write_text('{"scores": [1.0, 2.0, 4.0]}')
    assert ablation.scores(tmp_path, "labels", "imagined") == [1.0, 2.0, 4.0]
    assert ablation.scores(tmp_path, "alpha", "10") == []
    ablation.draw(tmp_path, tmp_path / "ablation.png", "title")
    assert (tmp_path / "ablation.png").stat().st_size > 5_000


def test_ratios_are_of_medians():
    results = [measure.Rates("a", [1.0, 9.0, 2.0]), measure.Rates("b", [4.0, 4.0, 4.0])]
    assert measure.ratio(results, "b", "a") == "2.00"
    assert measure.rows(results, ["a"])[1] == ["b", "4.0", "4.0 to 4.0", "2.00"]


def test_contestants_take_turns_and_every_other_round_goes_backwards():
    calls = []
    measure.interleave({name: lambda name=name: calls.append(name) or 1 for name in "ab"}, rounds=2)
    assert calls == ["a", "b", "a", "b", "b", "a"]


def test_what_remains_of_a_run_is_neither_networks_nor_drawing_nor_callbacks():
    seconds = {"fit": 100.0, "before/data": 10.0, "agent/stage": 60.0, "agent/networks": 30.0, "agent/drawing": 6.0}
    seconds |= {"agent/evaluation": 15.0, "agent/regeneration": 5.0, "after/last evaluation": 5.0}
    assert end_to_end.stage_body(seconds) == [
        ["agent", *["60.00", "30.00", "6.00", "0.00", "15.00", "5.00", "4.00"], "10.0 %"]
    ]
    rows = {row[0]: row[1:] for row in end_to_end.run_body(seconds)}
    assert rows["the rest"] == ["25.00", "25.0 %"]
    assert rows["all evaluations, of these"] == ["20.00", "20.0 %"]


def test_batches_are_timed_one_by_one():
    clock = end_to_end.Clock()
    clock.stage = "agent"
    timed = clock.wrap_batches(lambda loader: iter(loader))
    assert list(timed([1, 2, 3])) == [1, 2, 3]
    assert clock.seconds["agent/drawing"] > 0


def weights(network: nn.Sequential) -> torch.Tensor:
    """All weights of plain layers in the order of `BatchedMLP`."""
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return torch.cat([part.detach().flatten() for layer in linear for part in (layer.weight, layer.bias)])


@pytest.mark.parametrize(("plain_kind", "kind"), [(PlainTD3BC, TD3BC), (PlainIQL, IQL)])
def test_the_plain_loop_and_dawm_learn_the_same(plain_kind, kind):
    """From the same weights, on the same batches and with the same noise: the contestants do the same work.

    In double precision: Adam divides a gradient by its size, so that the last bits of one near 0 would show.
    """
    torch.manual_seed(0)
    plain, ours = plain_kind(5, 2), kind(5, 2).double()
    for part in vars(plain).values():
        if isinstance(part, nn.Module):
            part.double()
        elif isinstance(part, nn.Parameter):
            part.data = part.data.double()
    twins = [(plain.critic_1, plain.critic_2), (plain.critic_1_target, plain.critic_2_target)]
    pairs = [(torch.stack([weights(critic) for critic in pair]), network.weights)
             for pair, network in zip(twins, (ours.critics, ours.target_critics))]  # fmt: skip
    singles = [(plain.actor, ours.actor)]
    singles += [(plain.value, ours.value)] if isinstance(ours, IQL) else [(plain.actor_target, ours.target_actor)]
    with torch.no_grad():
        for start, parameter in [*pairs, *((weights(network), other.weights) for network, other in singles)]:
            parameter.copy_(start)
    data = random_data(2000, 5, 2)
    data = replace(data, terminations=(data.rewards > 1).float())
    data = data._apply(torch.Tensor.double)
    buffer = PlainBuffer(data)
    for index in range(20):
        rows = torch.arange(64 * index, 64 * (index + 1))
        torch.manual_seed(index)
        plain.train([field[rows] for field in buffer.fields])
        torch.manual_seed(index)
        ours.update_index = index
        ours.update(data[rows])
    for pair, network in zip(twins, (ours.critics, ours.target_critics)):
        torch.testing.assert_close(network.weights, torch.stack([weights(c) for c in pair]), atol=1e-8, rtol=1e-6)
    for network, other in singles:
        torch.testing.assert_close(other.weights, weights(network), atol=1e-8, rtol=1e-6)
    assert not torch.allclose(ours.critics.weights, pairs[0][0], atol=1e-3), "nothing was learnt"


def test_compiled_jax_and_dawm_learn_the_same():
    """In a process of its own, in which JAX may compute in double precision."""
    pytest.importorskip("jax")
    done = subprocess.run([sys.executable, "-c", JAX_SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


JAX_SCRIPT = """
import itertools

import numpy as np
import torch

from benchmarks import jax_agents
import jax
import jax.numpy as jnp
from benchmarks.agent_update import random_data
from dawm.agents import IQL, TD3BC

jax.config.update("jax_enable_x64", True)
data = random_data(2000, 5, 2)._apply(torch.Tensor.double)
data = data.__class__(*[*list(vars(data).values())[:4], (data.rewards > 1).double()])
for kind, norm in itertools.product((TD3BC, IQL), (False, True)):
    torch.manual_seed(0)
    ours = kind(5, 2, critic_layer_norm=norm).double()
    if norm:
        torch.nn.init.normal_(ours.critics.weights, std=0.2)
        ours.target_critics.load_state_dict(ours.critics.state_dict())

    def layers(network, ins, outs, norm=False, index=None):
        weights = network.weights if index is None else network.weights[index]
        return jax_agents.network(weights.detach().numpy().copy(), (ins, 256, 256, outs), norm)

    actor, critics = layers(ours.actor, 5, 2), [layers(ours.critics, 7, 1, norm, i) for i in range(2)]
    if kind is TD3BC:
        state = jax_agents.td3_bc_state(actor, critics)
    else:
        state = jax_agents.iql_state(actor, layers(ours.value, 5, 1), critics, 2)
    start = ours.critics.weights.detach().clone()
    for index in range(6):
        batch = data[torch.arange(64 * index, 64 * (index + 1))]
        ours.update_index = index
        torch.manual_seed(index)
        ours.update(batch)
        torch.manual_seed(index)
        noise = torch.randn_like(batch.actions).numpy()
        fields = tuple(jnp.asarray(field.numpy()) for field in list(vars(batch).values())[:5])
        if kind is TD3BC:
            state = jax_agents.td3_bc_critics(state, fields, noise)
            if index % 2:
                state = jax_agents.td3_bc_actor(state, fields)
        else:
            state = jax_agents.iql_update(state, fields)
    for found, expected in (
        (state["critics"], ours.critics.weights), (state["target_critics"], ours.target_critics.weights),
        ([state["actor"]], ours.actor.weights[None]),
    ):
        found = np.stack([jax_agents.flat(network) for network in found])
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-8, rtol=1e-5)
    assert not torch.allclose(ours.critics.weights, start, atol=1e-4), "nothing was learnt"
"""
