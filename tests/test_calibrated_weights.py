"""Calibration into the weight file: whole, taken up after any matrix, refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_kv import models
from edge_kv.errors import ConfigError, ExportError, WeightsError
from edge_kv.export.calibrated_weights import (
    NONE,
    SHIPPED,
    Calibration,
    calibrate_weights,
    calibrated,
)
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    weight_reports,
    write_weights,
)
from edge_kv.formats import dequantise, unpack
from edge_kv.models.sources import open_weights
from edge_kv.nets.oracle import table_values
from edge_kv.progress import Silent
from edge_kv.tensors import weight_formats

CONFIG = models.get_row("tiny").config
SOURCE = open_weights("random:3", CONFIG)
LAYOUT = WeightLayout(models.weights(CONFIG), weight_formats("int4"))


class Dying(Silent):
    """Stops the work after so many matrices."""

    def __init__(self, after):
        self.after = after

    def advance(self, what, done_bytes, total_bytes):
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


def calibration(n=3, length=24):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, CONFIG.vocab, (length,), generator=generator) for _ in range(n)]
    return Calibration("mine", "0", tuple(ids))


def run(folder, progress=None):
    folder.mkdir(exist_ok=True)
    journal, path = Journal(folder / "journal"), folder / "weights.bin"
    write_weights(SOURCE, LAYOUT, path, journal, Silent(), calibrated(LAYOUT))
    calibrate_weights(
        CONFIG, SOURCE.read, LAYOUT, path, journal, calibration(), progress or Silent(),
        token_rows=table_values(CONFIG, SOURCE.read),
    )  # fmt: skip
    return path, weight_reports(LAYOUT, journal)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "a")


def test_every_tensor_is_stored_near_its_source(whole):
    path, reports = whole
    assert set(reports) == {t.spec.name for t in LAYOUT.tensors if t.format}
    stored = StoredWeights(LAYOUT, path)
    for t in LAYOUT.tensors:
        if t.format is None:
            continue
        packed = stored.read(LAYOUT.region(t).name, 0, LAYOUT.region(t).shape[0]).numpy()
        values = dequantise(t.format, unpack(t.format, packed, *t.spec.shape))
        source = SOURCE.read(t.spec.name)
        error = np.linalg.norm(values - source) / np.linalg.norm(source)
        assert error == pytest.approx(reports[t.spec.name].error, rel=1e-3, abs=1e-6)
        assert error < (0.2 if t.format.bits == 4 else 0.01), t.spec.name


@pytest.mark.parametrize("after", [1, 9, 40])
def test_a_killed_calibration_ends_in_the_same_bytes(whole, tmp_path, after):
    folder = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        run(folder, Dying(after))
    path, reports = run(folder)
    assert path.read_bytes() == whole[0].read_bytes() and reports == whole[1]


def test_a_finished_calibration_reads_no_text_again(whole):
    run(whole[0].parent, Dying(1))


def test_what_can_be_asked_for():
    def encode(text):
        return [7] * 20

    assert Calibration.of(NONE, encode, [2], 512) is None
    assert Calibration.of(SHIPPED, None, [2], 512) is None
    shipped = Calibration.of(SHIPPED, encode, [2], 8)
    assert [len(text) for text in shipped.texts] == [8, 8, 7] and shipped.tokens == 23
    assert shipped.as_dict()["text"] == "shipped" and len(shipped.digest) == 64
    with pytest.raises(ConfigError, match="without a tokenizer cannot read"):
        Calibration.of("notes.txt", None, [2], 512)
    with pytest.raises(WeightsError, match=r"nowhere.txt cannot be read"):
        Calibration.of("nowhere.txt", encode, [2], 512)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match="is not UTF-8"):
        Calibration.of(str(tmp_path / "binary"), list, [2], 512)
    (tmp_path / "empty").touch()
    with pytest.raises(ExportError, match="empty"):
        Calibration.of(str(tmp_path / "empty"), list, [2], 512)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no device 'cuda' here"):
        calibrate_weights(
            CONFIG, SOURCE.read, LAYOUT, tmp_path / "w", Journal(tmp_path / "j"),
            calibration(), Silent(), device="cuda",
        )  # fmt: skip
