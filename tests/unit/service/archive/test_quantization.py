"""int8: what is measured, which layers stay in floating point, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from handler.errors import InvalidModel, SetupError
from service.archive import quantization
from service.archive.inference import answer, compile_for_one
from service.archive.quantization import quantize
from service.archive.ranking import divergence, rank_layers
from service.archive.saturation import Int8Layer, _errors, _least_error, fit_ranges, int8_layers

SIDE = 16
CLASSES = 4


def tiny_model(seed: int = 0) -> ov.Model:
    """uint8 [B, 3, H, W] -> convolution, depthwise convolution, linear -> probabilities [B, 4]."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> ov.Node:
        return ops.constant(rng.normal(0, 0.5, shape).astype(np.float32))

    images = ops.parameter([-1, 3, SIDE, SIDE], np.uint8, name="images")
    x = ops.multiply(ops.convert(images, np.float32), ops.constant(np.float32(1 / 64)))
    x = ops.convolution(x, weights(16, 3, 3, 3), [2, 2], [1, 1], [1, 1], [1, 1], name="stem")
    x = ops.relu(x)
    x = ops.group_convolution(
        x, weights(16, 1, 1, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1], name="depthwise"
    )
    x = ops.reduce_mean(ops.relu(x), ops.constant([2, 3]), keep_dims=False)
    x = ops.matmul(x, weights(CLASSES, 16), False, True, name="classifier")
    return ov.Model([ops.softmax(x, 1)], [images])


def pictures(count: int) -> list[NDArray[np.uint8]]:
    """Noise around a colour: every picture another."""
    rng = np.random.default_rng(1)
    colours = rng.integers(30, 226, (count, 3, 1, 1))
    noise = rng.integers(-30, 30, (count, 3, SIDE, SIDE))
    return list((colours + noise).astype(np.uint8))


def stem_of(int8: ov.Model) -> Int8Layer:
    return next(layer for layer in int8_layers(int8) if layer.name == "stem")


def with_stem(weight: int, model: ov.Model, images: list[NDArray[np.uint8]]) -> ov.Model:
    """The model in int8, with this weight everywhere in its first layer."""
    nncf = quantization.import_nncf()
    int8 = quantization._quantize_once(nncf, model, images, (), ov.Core())
    stem_of(int8).replace(np.full((1, 16, 3, 9), weight), np.ones((1, 16)))
    return int8


def answers(model: ov.Model, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    return answer(compile_for_one(model, images[0].shape, ov.Core()), images)


@pytest.mark.precision("int8")
def test_quantizes_and_reports(tmp_path: Path) -> None:
    images = pictures(110)
    model = tiny_model()
    labels = answers(model, images).argmax(axis=1).tolist()

    int8, report = quantize(model, images, labels, minimum_agreement=0.9)

    assert report.calibration_images == 55
    assert report.measured_images == 55
    assert report.accuracy_fp32 == 1
    assert report.accuracy_int8 == report.agreement >= 0.9
    expected, actual = answers(model, images[1::2]), answers(int8, images[1::2])
    assert report.largest_probability_difference == pytest.approx(np.abs(expected - actual).max())
    assert report.layers == 2  # without the depthwise one
    assert len(int8_layers(int8)) == 2 - len(report.floating_point_layers)
    assert int8.inputs[0].element_type == ov.Type.u8
    assert int8.inputs[0].partial_shape[0].is_dynamic
    ov.save_model(int8, tmp_path / "int8.xml")
    saved = ov.Core().read_model(tmp_path / "int8.xml")
    assert np.allclose(answers(saved, images[1::2]), actual, atol=1e-3)


def test_a_model_that_does_not_agree_is_refused_with_its_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = r"int8 agrees with fp32 on [01]\.\d{3} of 50 images, .*; the minimum is 1\.1$"
    with pytest.raises(InvalidModel, match=figures):
        quantize(tiny_model(), pictures(100), minimum_agreement=1.1)  # which nothing can reach
    assert "Ranking layers: 2 layers\n" in capsys.readouterr().err


def test_layers_are_ranked_only_if_the_agreement_is_missed_and_each_stage_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quantize(tiny_model(), pictures(100), minimum_agreement=0)
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("s")]
    assert said == [
        "Measuring fp32: 50 images",
        "Calibrating int8: 50 images",
        "Sampling activations: 50 images",
        "Fitting weights: 2 layers",
        "Measuring int8: 50 images",
    ]


def test_the_most_harmful_layer_is_ranked_first() -> None:
    images, model = pictures(20), tiny_model()
    int8 = with_stem(0, model, images)
    ranking = rank_layers(model, int8, images, ov.Core())
    assert [name for name, _ in ranking] == ["stem", "classifier"]


def test_ranges_are_fitted_where_pairs_would_be_clipped() -> None:
    images, model = pictures(20), tiny_model()
    int8 = with_stem(127, model, images)
    before = stem_of(int8).real_weights()
    fit_ranges(int8, model, images, ov.Core())
    after = stem_of(int8)
    assert after.grouped().max() < 127
    assert np.allclose(after.real_weights(), before, rtol=0.02)


def test_nothing_is_refitted_without_clipping() -> None:
    pixels = np.full((10, 2), 128, np.float32)
    weights = np.array([[[[127], [127]]]])  # 128 x 254 is below 2**15
    rounded, shrinks = _least_error(pixels, 0, weights)
    assert (rounded == weights).all()
    assert shrinks == 1


def test_clipped_pairs_are_what_vpmaddubsw_gives() -> None:
    pixels = np.array([[255, 255, 1]], np.float32)
    weights = np.array([[[127], [127], [10]], [[127], [0], [0]]])
    error, clipped = _errors(pixels, 0, weights, weights, 1)
    assert error == pytest.approx([(2 * 255 * 127 - 32767) ** 2, 0])
    assert clipped.tolist() == [True, False]


@pytest.mark.parametrize("zero", [0.0, 17.0])
def test_errors_are_those_of_every_pair_computed(zero: float) -> None:
    """Only the pairs that could be clipped are computed; here all are."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 5)).astype(np.float32)
    exact = rng.integers(-127, 128, (7, 5, 2))
    trial = np.rint(exact / 1.2).astype(np.int64)
    sums = np.zeros((40, 7, 2))
    clipped = np.zeros(7, np.bool_)
    for channels in (slice(0, 2), slice(2, 4), slice(4, 5)):
        pairs = np.einsum("ni,oik->nok", pixels[:, channels], trial[:, channels])
        clipped |= (np.abs(pairs + 0.5) > 32768).any((0, 2))
        sums += pairs.clip(-32768, 32767)
    actual = 1.2 * (sums - zero * trial.sum(1))
    expected = np.einsum("ni,oik->nok", pixels - zero, exact)
    error, found = _errors(pixels, zero, exact, trial, 1.2)
    assert found.tolist() == clipped.tolist()
    assert 0 < clipped.sum() < 7
    assert error == pytest.approx(np.square(actual - expected).mean(0).sum(1), rel=1e-4)


def test_answers_are_in_the_order_of_the_images() -> None:
    images, model, done = pictures(20), tiny_model(), []
    compiled = compile_for_one(model, images[0].shape, ov.Core())
    together = answer(compiled, images, lambda: done.append(1))
    alone = [compiled(image[None])[0][0] for image in images]
    assert np.allclose(together, alone, atol=1e-6)
    assert len(done) == 20


def test_too_few_images_or_labels_are_refused() -> None:
    with pytest.raises(InvalidModel, match=r"needs 100 images or more.*got 99$"):
        quantize(tiny_model(), pictures(99))
    with pytest.raises(InvalidModel, match="3 labels for 100"):
        quantize(tiny_model(), pictures(100), [0, 1, 2])


def test_a_label_beyond_the_classes_is_refused() -> None:
    with pytest.raises(InvalidModel, match="a label is class 4, the model has 4 classes"):
        quantize(tiny_model(), pictures(100), [CLASSES] * 100)


def test_without_nncf_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(SetupError, match=r"pip install -r requirements-int8\.txt$"):
        quantize(tiny_model(), pictures(100))


def test_outliers_are_given_back_then_more_up_to_a_third() -> None:
    assert list(quantization._counts([50.0, 20.0, *[1.0] * 28])) == [2, 4, 8, 10]
    assert list(quantization._counts([1.0] * 90)) == [1, 2, 4, 8]
    assert list(quantization._counts([1.0, 1.0])) == []


def test_divergence_of_equals_is_nothing() -> None:
    rows = np.array([[0.5, 0.5], [1, 0]], np.float32)
    assert divergence(rows, rows) == 0
    assert divergence(rows, rows[::-1]) > 1
