"""Benchmarks' own models and lists of shapes are those of the models they are named after."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import bench_lists, bench_step, list_comparators, shapes, steps, torchjd_steps
from benchmarks.list_comparators import Lists
from benchmarks.models import Size
from benchmarks.molecule_model import ELEMENTS, GEOMETRY, TARGETS, Molecules, read
from benchmarks.plan import LeftOut, Options
from benchmarks.shapes import Shape
from benchmarks.vision_models import Vision

COUNTS = {  # tensors and numbers as torchvision and transformers count them
    "ResNet-18": (62, 11_689_512),
    "ResNet-50": (161, 25_557_032),
    "Swin-B": (329, 87_768_224),
    "ViT-L": (296, 304_326_632),
    "Llama-1B": (146, 1_235_814_400),
}
OPTIONS = Options(device=torch.device("cpu"), rounds=3, quick=False, threads=1, compiled=False, data=None)


@pytest.mark.parametrize("name", COUNTS)
def test_known_counts(name: str) -> None:
    params = shapes.ENCODERS[name]()
    assert (len(params), shapes.numbers(params)) == COUNTS[name]


def test_segnet_is_vgg_and_its_mirror_image() -> None:
    params = shapes.segnet()
    convolutions = [shape for shape in params if len(shape) == 4]
    encoder, decoder = convolutions[:13], convolutions[13:]
    # The convolutions of torchvision's vgg16_bn: 14,714,688 weights and biases.
    assert shapes.numbers(encoder) + sum(shape[0] for shape in encoder) == 14_714_688
    assert [shape[:2] for shape in decoder] == [(i, o) for o, i, *_ in reversed(encoder[1:])]
    assert len(params) == 4 * len(convolutions)


def shapes_of(vision: Vision) -> list[Shape]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in vision.build().shared()]


def test_the_resnets_have_the_parameters_of_torchvisions_in_their_order() -> None:
    assert shapes_of(Vision("office", 3, 1)) == shapes.resnet18()[:-2]  # without the classifier
    assert shapes_of(Vision("scene", 3, 1)) == shapes.resnet50()[:-2]


def test_the_transformer_has_the_parameters_of_torchvisions() -> None:
    assert sorted(shapes_of(Vision("vit", 5, 1))) == sorted(shapes.vit_large()[:-2])


@pytest.mark.parametrize(
    ("vision", "features"),
    [
        (Vision("office", 3, 64), [(64, 512)] * 3),
        (Vision("scene", 3, 8, 288, 384), [(8, 2048, 36, 48)]),
        (Vision("vit", 5, 16), [(16, 1024)]),
    ],
)
def test_features_and_losses_at_full_size(vision: Vision, features: list[Shape]) -> None:
    with torch.device("meta"):
        model = vision.build()
        found = model.features()
        losses = model.losses_of(found)
    assert [tuple(x.shape) for x in found] == features
    assert [tuple(loss.shape) for loss in losses] == [()] * vision.tasks
    assert sum(p.numel() for p in model.shared()) == vision.P


@pytest.fixture
def qm9(tmp_path: Path) -> Path:
    """Two files as QM9's, of seven made-up molecules."""
    random = np.random.default_rng(0)
    sizes = np.array([5, 3, 2, 4, 6, 3, 5], dtype=np.uint8)
    elements = random.choice(np.array(ELEMENTS, dtype=np.uint8), sizes.sum())
    positions = random.integers(-3000, 3000, (sizes.sum(), 3), dtype=np.int16)
    np.savez(tmp_path / GEOMETRY, n_atoms=sizes, Z=elements, pos_milliA=positions)
    np.savez(tmp_path / TARGETS, y=random.standard_normal((len(sizes), 11), dtype=np.float32))
    return tmp_path


def test_molecules_are_read_whole(qm9: Path) -> None:
    atoms, positions, targets = read(qm9, 7)
    assert sorted((atoms > 0).sum(1).tolist()) == [2, 3, 3, 4, 5, 5, 6]
    assert positions[atoms == 0].abs().max() == 0
    assert positions.abs().max() <= 3
    torch.testing.assert_close(targets.mean(0), torch.zeros(11), atol=1e-6, rtol=0)
    with np.load(qm9 / GEOMETRY) as geometry:
        drawn = torch.tensor(ELEMENTS)[atoms[atoms > 0] - 1]
        assert sorted(drawn.tolist()) == sorted(geometry["Z"].tolist())


def test_features_of_molecules_do_not_depend_on_where_they_are(qm9: Path) -> None:
    model = Molecules(qm9, 4, width=8, rounds=2).build()
    (before,) = model.features()
    assert isinstance(model.positions, torch.Tensor)
    turned = torch.linalg.qr(torch.randn(3, 3)).Q
    model.keep(positions=model.positions @ turned + 1)
    (after,) = model.features()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_all_ways_agree_where_graphs_are_shared_by_eleven_tasks(qm9: Path) -> None:
    assert steps.check(Molecules(qm9, 4, width=8, rounds=1)).keys() == steps.BALANCED.keys()


class OwnBatches(Size):
    """The MLP, each task with rows of its own."""

    def build(self):  # type: ignore[no-untyped-def]
        model = super().build()
        model.own_batches = True
        inputs = model.inputs
        model.features = lambda: [model.encoder((t + 1) * inputs) for t in range(self.tasks)]
        model.losses_of = lambda features: [
            torch.nn.functional.mse_loss(head(x), y)
            for head, x, y in zip(model.heads, features, model.targets, strict=True)
        ]
        return model


def test_all_ways_agree_where_each_task_has_its_graph() -> None:
    assert steps.check(OwnBatches(depth=2, width=16, tasks=3, batch=4)).keys() == steps.BALANCED.keys()


def test_what_is_too_large_for_a_cpu_is_left_out_aloud() -> None:
    left_out = [case for case in bench_step.cases(OPTIONS) if case.gpu_only]
    assert [str(case.problem).split()[0] for case in left_out] == ["dilated", "ViT-L/16"]
    with pytest.raises(LeftOut, match=r"^on a CPU a step takes tens of seconds"):
        bench_step._case(left_out[0], OPTIONS)


def test_without_torchjd_its_steps_are_skipped_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    spec = importlib.util.spec_from_file_location("without_torchjd", torchjd_steps.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    assert isinstance(module, ModuleType)
    spec.loader.exec_module(module)
    assert module.WHY_NOT.startswith("TorchJD was skipped: ")
    assert not module.BALANCED
    assert not module.OTHERS
    assert torchjd_steps.WHY_NOT is None


@pytest.mark.parametrize("name", list_comparators.KINDS)
def test_ways_from_lists_to_grad_are_exact_and_a_wrong_one_is_noticed(name: str) -> None:
    lists = Lists([(20, 10), (20,), (5, 20), (1,)], 3)
    candidate = list_comparators.KINDS[name](lists, 0.7)
    for _ in range(2):  # the second from a state that is not zero any more
        candidate()
    first = lists.error(0.7)
    assert first > 0.1  # so that is seen, too
    fresh = list_comparators.KINDS[name](lists, 0.7)
    lists.write([None] * len(lists.params))
    fresh()
    assert lists.error(0.7) < 1e-5


def test_lists_of_all_models_are_measured() -> None:
    titles = [table.title for table in bench_lists.tables(OPTIONS)]
    assert len(titles) == len(shapes.ENCODERS)
    assert titles[0] == "lists: ResNet-18, 62 gradients, T=3, P=11.69M"
