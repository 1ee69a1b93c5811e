"""Schedules that are found: by dynamic programming against trying all of them, and the command on a tiny model."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from mlx_deepcache.apps import search
from mlx_deepcache.apps.calibrate import main_calibrate
from mlx_deepcache.cache.forecast import TaylorSeer
from mlx_deepcache.cache.text import parse

N = 11
SMALL = ["--steps", "7", "--scheduler", "ddim", "--height", "64", "--width", "64", "--dtype", "float32"]


@pytest.fixture(scope="module")
def features():
    """Of 3 pictures in 11 steps, (P, N, values): a random walk, as neighbouring steps are alike."""
    return np.random.default_rng(0).standard_normal((3, N, 40)).cumsum(1)


def total(features, gain, steps, forecast) -> float:
    """What a schedule costs, from the features themselves."""
    cost = 0.0
    for at, last in enumerate(steps):
        end = steps[at + 1] if at + 1 < len(steps) else N
        kept = list(steps[max(0, at - 1) : at + 1])[-forecast.history :]
        wrong = sum(
            gain[i] * (features[:, i] - np.einsum("k,pkv->pv", forecast.weights(kept, i, N), features[:, kept]))
            for i in range(last + 1, end)
        )
        cost += float(np.mean(np.sum(np.square(wrong), -1))) if end > last + 1 else 0.0
    return cost


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("full", [2, 3, 5])
def test_the_schedule_found_is_the_best_of_all(features, full, order):
    gain, forecast = np.linspace(0.5, 2, N), TaylorSeer(order)
    likenesses = np.einsum("piv,pjv->pij", features, features)
    steps = search.cheapest(search.costs(likenesses, gain, forecast, N), N, full)
    every = [(0, *rest) for rest in combinations(range(1, N), full - 1)]
    best = min(every, key=lambda steps: total(features, gain, steps, forecast))
    assert steps == best


def test_gains_are_what_made_the_errors(features):
    """Errors of pictures that are 3 times those of the features."""
    likenesses = np.einsum("piv,pjv->pij", features, features)
    runs = search.windows(N, 4)
    assert {i for run in runs for i in run} == set(range(1, N))
    errors = [np.sum(np.square(3 * sum(features[:, i] - features[:, run[0] - 1] for i in run)), -1) for run in runs]
    assert np.allclose(search.gains(likenesses, runs, np.array(errors)), 3)


def test_no_schedule_where_the_tables_do_not_reach(features):
    likenesses = np.einsum("piv,pjv->pij", features, features)
    assert search.cheapest(search.costs(likenesses, np.ones(N), TaylorSeer(0), 2), N, 3) is None


def test_found_comes_from_half_of_the_prompts(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts").write_text("a cat\na dog\na tree\na house\n")
    (tmp_path / "policies").write_text("deepcache:interval=2\ndeepcache:interval=3\n")
    given = ["--model", checkpoint("sd15"), *SMALL, "--prompts", tmp_path / "prompts", "--batch", "2"]
    given += ["--policies", tmp_path / "policies", "--work", tmp_path / "work", "--output", tmp_path / "front.json"]
    given += ["--search", "--full-steps", "3"]
    assert main_calibrate([str(a) for a in given]) == 0
    said, front = capsys.readouterr().out, json.loads((tmp_path / "front.json").read_text())
    assert front["pictures"] == 2
    told = [line for line in said.splitlines() if line.startswith("3 full steps: ")]
    policies = told[-1].partition(" with ")[2].split()
    assert len(parse(policies[0]).steps) == 3
    values = [float(line.split()[3]) for line in told]
    assert values == sorted(values)  # it only ever comes nearer
    listed = [row["cache"] for row in front["policies"]]
    left_out = [line for line in said.splitlines() if line.startswith("left out, as other prompts")]
    assert len(listed) + len(left_out) == 3


def test_what_the_search_needs(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts").write_text("a cat\n")
    given = ["--model", checkpoint("sd15"), *SMALL, "--work", tmp_path, "--output", tmp_path / "front.json"]
    assert main_calibrate([str(a) for a in [*given, "--search", "--prompts", tmp_path / "prompts"]]) == 2
    assert "--search needs 2 prompts or more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main_calibrate([str(a) for a in [*given, "--full-steps", "3"]])
    assert stopped.value.code == 2
    assert "--full-steps are those of --search" in capsys.readouterr().err


@pytest.mark.parametrize("full", ["1", "7"])
def test_impossible_budgets(checkpoint, tmp_path, capsys, full):
    given = ["--model", checkpoint("sd15"), *SMALL, "--work", tmp_path, "--search", "--full-steps", full]
    assert main_calibrate([str(a) for a in [*given, "--output", tmp_path / "front.json"]]) == 2
    assert "--full-steps should be from 2 to 6 of 7 steps, got" in capsys.readouterr().err
