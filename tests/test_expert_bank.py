"""Experts read into a bank give the products of mapped ones, whatever fits."""

import ctypes
import threading

import numpy as np
import pytest
from native_call import Operators

from edge_kv.runtime import experts

EXPERTS, DIM, WIDTH, START = 12, 96, 64, 40  # the stacks begin where no sector does
SHAPES = ((EXPERTS, 2 * WIDTH, DIM), (EXPERTS, DIM, WIDTH))
BOTH = sum(4 * a * b for _, a, b in SHAPES) + 4 * 4096  # what one expert takes of a bank


@pytest.fixture(scope="module")
def operators():
    return Operators()


@pytest.fixture
def keep(operators):
    def keep(count):
        operators.native.edge_kv_keep_experts(ctypes.c_int64(int(count * BOTH)))

    yield keep
    keep(0)


@pytest.fixture
def stacks(tmp_path):
    """Stacks mapped from a file, in which this process sees zeros: only a bank reads the file."""
    rng = np.random.default_rng(3)
    held = [rng.normal(size=shape).astype(np.float32) / 8 for shape in SHAPES]
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\7" * START + b"".join(x.tobytes() for x in held))
    mapped, at = [], START
    for values in held:
        view = np.memmap(path, np.float32, mode="c", offset=at, shape=values.shape)
        view[...] = 0
        mapped.append(view)
        at += values.nbytes
    return held, mapped


def call(operators, stacks, tokens, seed, threads=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, DIM)).astype(np.float32)
    index = rng.integers(0, EXPERTS, (tokens, 2))
    weight = rng.uniform(size=(tokens, 2)).astype(np.float32)
    return operators.run(
        "experts_q", [x, index, weight, *stacks], threads=threads, width=WIDTH, format="",
        down_format="", act="silu", limit=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 5, EXPERTS + 1])
def test_products_are_those_of_the_file(operators, keep, stacks, count):
    held, mapped = stacks
    keep(count)
    for seed, tokens in enumerate((1, 1, 7, 1, 30, 1, 2)):
        expected = call(operators, held, tokens, seed)
        np.testing.assert_array_equal(call(operators, mapped, tokens, seed), expected)
        assert np.abs(expected).max() > 0.01


def test_too_small_a_bank_leaves_them_mapped(operators, keep, stacks):
    _, mapped = stacks
    keep(0.9)
    assert not call(operators, mapped, 3, 0).any()


def test_matrices_that_are_in_no_file(operators, keep, stacks):
    held, _ = stacks
    expected = call(operators, held, 5, 1)
    keep(2)
    np.testing.assert_array_equal(call(operators, held, 5, 1), expected)


def test_a_new_bank_remembers_nothing(operators, keep, stacks, tmp_path):
    """Another file may be mapped where one was: a bank of before must not answer for it."""
    held, mapped = stacks
    keep(EXPERTS)
    call(operators, mapped, 9, 1)
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\7" * START + b"".join((2 * x).tobytes() for x in held))
    keep(EXPERTS)
    expected = call(operators, [2 * x for x in held], 9, 1)
    np.testing.assert_array_equal(call(operators, mapped, 9, 1), expected)


def test_two_callers_share_a_bank(operators, keep, stacks):
    """What one holds the other cannot have: then it takes a matrix from where it is mapped."""
    held, mapped = stacks
    for view, values in zip(mapped, held, strict=True):
        view[...] = values
    expected = [call(operators, held, 4, seed) for seed in range(20)]
    keep(3)
    wrong = []

    def work(start):
        for seed in range(start, 20, 2):
            if not np.array_equal(call(operators, mapped, 4, seed, threads=1), expected[seed]):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("available", "expected"),
    [(None, 0), (1000, 0), (999, 899), (150, 50), (105, 10), (100, 10), (10, 10)],
)
def test_the_bank_takes_what_is_left(available, expected):
    if available is not None:
        available += experts.RESERVE
    assert experts.bank_bytes(900, 10 * experts.LEAST, 100, available) == expected
