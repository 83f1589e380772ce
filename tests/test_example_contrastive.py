"""Runs examples/contrastive.py on few molecules."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

for _extra in ("matplotlib", "rdkit", "tqdm"):
    pytest.importorskip(_extra)

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--molecules", "12", "--poses", "2", "--steps", "3", "--batch-sizes", "2", "4"]

# Importing torch_geometric calls torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pytest.importorskip("torch_geometric")
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield importlib.import_module("contrastive")
    torch.set_num_threads(threads)


def test_training_and_costs(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    options = [*TINY, "--cache", str(tmp_path / "cache"), "--output", str(plot)]
    trained, costs = example.main(options)
    printed = capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| chance" in printed
    assert "| batches of 4 " in printed
    assert [each.batch_size for each in trained] == [2, 4]
    full, *others = costs
    assert max(cost.error for cost in others) < 1e-5
    assert {cost.way: cost.peak < full.peak / 1.5 for cost in others}["MultiPose, memory=0, chunks of 8"]

    parsed = example.parse_arguments(options)
    encoders = example.make_encoders(parsed.seed, parsed.combination, parsed.device, memory=0)
    again = example.train(encoders, parsed, 4, *example.load(parsed))
    assert again.accuracy == trained[1].accuracy  # less memory gives the same training
    torch.testing.assert_close(torch.tensor(again.losses), torch.tensor(trained[1].losses), rtol=1e-4, atol=1e-4)


def test_retrieval_counts_the_right_graphs(example: ModuleType) -> None:
    class Fixed:
        """Returns the same embeddings for any poses."""

        def __init__(self, embeddings: torch.Tensor) -> None:
            self.combined = self.per_pose = embeddings

        def __call__(self, poses: object) -> "Fixed":
            del poses
            return self

    embeddings = torch.eye(4)
    shifted = embeddings.clone()
    shifted[0] = torch.tensor([0.5, 1.0, 0.0, 0.0])  # nearest to the second
    molecules = example.Molecules([(torch.ones(1), torch.ones(2, 0))] * 4, [[(torch.ones(1), torch.ones(1, 3))]] * 4)
    at_one, at_ten = example.retrieval(example.Encoders(Fixed(embeddings), Fixed(shifted)), molecules)
    assert (at_one, at_ten) == (0.75, 1.0)


def test_invalid_options_are_refused(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.parse_arguments(["--poses", "0"])
    assert "--poses must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--batch-sizes must be from 2 to 6"):
        example.main(["--molecules", "8", "--batch-sizes", "2", "7", "--cache", str(tmp_path)])
