"""Everything that one engine must do, run once for each ZeRO stage and number of ranks, and asserted by many tests."""

from typing import Any

import pytest

from tests.parallel.launch import run_ranks


def scenarios(name: str, directory: str) -> dict[str, Any]:
    """What a process group of the stage `name` goes through: its key -> scenario and arguments."""
    return {
        "views": ["views", {"deepspeed": name}],
        "empty": ["empty_micro_batches", {"deepspeed": name}],
        "mixed": ["mixed_names", {"deepspeed": name}],
        "torch": ["against_torch", {"deepspeed": name}],
        "loss": ["guarded", {"deepspeed": name, "precision": "fp32", "fault": "loss"}],
        "gradient": ["guarded", {"deepspeed": name, "precision": "fp32", "fault": "gradient"}],
        "resumed": ["resumed", {"deepspeed": name, "shards": directory, "half": 2}],
        "stable": ["stable_adamw", {"deepspeed": name}],
        "readings": ["readings", {"deepspeed": name}],
        "stable_resumed": ["resumed", {"deepspeed": name, "shards": f"{directory}/stable", "half": 2, "kind": "stable_adamw"}],
    }


@pytest.fixture(
    scope="session",
    params=[
        (1, "zero0"),
        (2, "zero1"),
        (2, "zero3"),
        pytest.param((2, "zero0"), marks=pytest.mark.slow),
        pytest.param((1, "zero1"), marks=pytest.mark.slow),
        pytest.param((1, "zero2"), marks=pytest.mark.slow),
        pytest.param((2, "zero2"), marks=pytest.mark.slow),
        pytest.param((1, "zero3"), marks=pytest.mark.slow),
        pytest.param((4, "zero3"), marks=pytest.mark.slow),
        pytest.param((2, "zero1_offload"), marks=pytest.mark.slow),
        pytest.param((2, "zero2_offload"), marks=pytest.mark.slow),
        pytest.param((2, "zero3_offload"), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[1]}-{param[0]}",
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of all scenarios on each rank."""
    world_size, name = request.param
    directory = tmp_path_factory.mktemp(name)
    return run_ranks("several", world_size, directory, scenarios=scenarios(name, str(directory)))
