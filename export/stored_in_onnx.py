"""Products of stored matrices in standard ONNX operators: what `linear_q` and `embed_q` come with.

onnxruntime has a kernel for blocks of 2, 4 or 8 bits (MatMulNBits), which wants them row by row. So
the text here takes the groups of rows apart and brings values and scales into that order. Its
inputs being constants, onnxruntime computes them once, when it loads the program, and holds the
result instead; a format of sixteen levels becomes 8 bits there. With native operators none of this
is used.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_kv.formats import BLOCK, GROUP, LINE, Format, value_lines

_F32, _I32, _F64 = 1, 6, 11  # ONNX's numbers of element types


def product(
    fmt: Format, x: str, packed: str, rows: int, cols: int, out: str, p: str = "w",
    rounded: bool = False,
) -> str:  # fmt: skip
    """`out` [T, rows] = `x` [T, cols] times the matrix in `packed`, as text; `p` begins names.

    Where x is `rounded` it is not rounded a second time.
    """
    groups, _ = fmt.shape(rows, cols)
    values, scales = value_lines(fmt, cols)
    blocks, per = fmt.blocks(cols), 4 * 8 // fmt.bits
    bits = 8 if fmt.levels else fmt.bits
    text = [
        _ints(f"{p}_lines_shape", [groups, -1, LINE]),
        f"{p}_lines = Reshape ({packed}, {p}_lines_shape)",
        _ints(f"{p}_at", values),
        f"{p}_taken = Gather <axis = 1> ({p}_lines, {p}_at)",
        _ints(f"{p}_lanes_shape", [groups, len(values), GROUP, 4]),
        f"{p}_lanes = Reshape ({p}_taken, {p}_lanes_shape)",
        f"{p}_by_row = Transpose <perm = [0, 2, 1, 3]> ({p}_lanes)",
        _ints(f"{p}_words_shape", [groups * GROUP, len(values), 4]),
        f"{p}_words = Reshape ({p}_by_row, {p}_words_shape)",
        *_codes(fmt, p, groups * GROUP, len(values) * per),
        *_fields(bits, p),
        _ints(f"{p}_none", [0]),
        _ints(f"{p}_rows", [rows]),
        f"{p}_kept = Slice ({p}_stored, {p}_none, {p}_rows)",
        _ints(f"{p}_b_shape", [rows, blocks, BLOCK * bits // 8]),
        f"{p}_b = Reshape ({p}_kept, {p}_b_shape)",
    ]
    if fmt.served:
        text += [
            _ints(f"{p}_scale_at", scales),
            f"{p}_scale_lines = Gather <axis = 1> ({p}_lines, {p}_scale_at)",
            _ints(f"{p}_scale_shape", [groups, len(scales) * fmt.served, GROUP, -1]),
            f"{p}_scale_bytes = Reshape ({p}_scale_lines, {p}_scale_shape)",
            f"{p}_scale_rows = Transpose <perm = [0, 2, 1, 3]> ({p}_scale_bytes)",
            *_block_scales(fmt, f"{p}_scale_rows", f"{p}_of_blocks", p),
        ]
    if fmt.has_row_scales:
        text += [
            f"{p}_head = Gather <axis = 1> ({p}_lines, {p}_none)",
            _ints(f"{p}_head_shape", [groups, GROUP, 4]),
            f"{p}_head_bytes = Reshape ({p}_head, {p}_head_shape)",
            *_floats(f"{p}_head_bytes", f"{p}_of_rows", p),
            _ints(f"{p}_behind", [2]),
            f"{p}_of_row = Unsqueeze ({p}_of_rows, {p}_behind)",
        ]
    text += [
        _scaled(fmt, p),
        _ints(f"{p}_flat_shape", [groups * GROUP, -1]),
        f"{p}_flat = Reshape ({p}_scales, {p}_flat_shape)",
        _ints(f"{p}_zeros", [0, 0]),
        _ints(f"{p}_ends", [rows, blocks]),
        f"{p}_some = Slice ({p}_flat, {p}_zeros, {p}_ends)",
        _ints(f"{p}_s_shape", [rows, blocks]),
        f"{p}_s = Expand ({p}_some, {p}_s_shape)",
        f"{out} = com.microsoft.MatMulNBits <K = {cols}, N = {rows}, bits = {bits}, "
        f"block_size = {BLOCK}, accuracy_level = {0 if rounded else 4}> ({x}, {p}_b, {p}_s)",
    ]
    return "\n".join(text)


def to_steps(x: str, step: str, out: str) -> str:
    """Text of `out`: x as -128 … 127 times the function's attribute `step`."""
    return f"""
        {out}_step = Constant <value_float : float = @{step}> ()
        {out}_lowest = Constant <value_float = -128.0> ()
        {out}_highest = Constant <value_float = 127.0> ()
        {out}_many = Div ({x}, {out}_step)
        {out}_near = Round ({out}_many)
        {out}_bound = Clip ({out}_near, {out}_lowest, {out}_highest)
        {out} = Mul ({out}_bound, {out}_step)"""


def bounded(x: str, cap: str, out: str) -> str:
    """Text of `out`: tanh(x / cap) * cap of the function's attribute `cap`."""
    return f"""
        {out}_cap = Constant <value_float : float = @{cap}> ()
        {out}_inner = Div ({x}, {out}_cap)
        {out}_tanh = Tanh ({out}_inner)
        {out} = Mul ({out}_tanh, {out}_cap)"""


def rows_of(packed: str, first: int, stop: int, out: str) -> str:
    """Text of `out`: the groups of `packed` that hold rows first … stop - 1."""
    return "\n".join(
        [
            _ints(f"{out}_first", [first // GROUP]),
            _ints(f"{out}_stop", [-(-stop // GROUP)]),
            f"{out} = Slice ({packed}, {out}_first, {out}_stop)",
        ]
    )


def lookup(fmt: Format, ids: str, packed: str, cols: int, out: str) -> str:
    """Text of `out` [T, cols]: the rows `ids` of the matrix in `packed`."""
    values, scales = value_lines(fmt, cols)
    per = 4 * 8 // fmt.bits
    text = [
        f"group_rows = Constant <value_int = {GROUP}> ()",
        f"group = Div ({ids}, group_rows)",
        f"lane = Mod ({ids}, group_rows)",
        _ints("last", [1]),
        "lane_at = Unsqueeze (lane, last)",
        f"groups = Gather <axis = 0> ({packed}, group)",
        _ints("lines_shape", [0, -1, LINE]),
        "lines = Reshape (groups, lines_shape)",
        _ints("at", values),
        "taken = Gather <axis = 1> (lines, at)",
        _ints("lanes_shape", [0, len(values), GROUP, 4]),
        "lanes = Reshape (taken, lanes_shape)",
        "by_row = Transpose <perm = [0, 2, 1, 3]> (lanes)",
        "w_words = GatherND <batch_dims = 1> (by_row, lane_at)",
        *_codes(fmt, "w", 0, len(values) * per),
        f"numbers = Cast <to = {_F32}> (w_codes)",
        f"zero = Constant <value_float = {128.0 if fmt.levels else float(2 ** (fmt.bits - 1))}> ()",
        "signed = Sub (numbers, zero)",
        _ints("blocks_shape", [0, -1, BLOCK]),
        "blocks = Reshape (signed, blocks_shape)",
    ]
    if fmt.served:
        text += [
            _ints("scale_at", scales),
            "scale_lines = Gather <axis = 1> (lines, scale_at)",
            _ints("scale_shape", [0, len(scales) * fmt.served, GROUP, -1]),
            "scale_bytes = Reshape (scale_lines, scale_shape)",
            "scale_rows = Transpose <perm = [0, 2, 1, 3]> (scale_bytes)",
            "scale_row = GatherND <batch_dims = 1> (scale_rows, lane_at)",
            *_block_scales(fmt, "scale_row", "all_blocks", "w"),
            _ints("none", [0]),
            _ints("n_blocks", [fmt.blocks(cols)]),
            "w_of_blocks = Slice (all_blocks, none, n_blocks, last)",
        ]
    if fmt.has_row_scales:
        text += [
            _ints("head_line", [0]),
            "head = Gather <axis = 1> (lines, head_line)",
            _ints("head_shape", [0, GROUP, 4]),
            "head_bytes = Reshape (head, head_shape)",
            "head_row = GatherND <batch_dims = 1> (head_bytes, lane_at)",
            *_floats("head_row", "of_row_flat", "w"),
            "w_of_row = Unsqueeze (of_row_flat, last)",
        ]
    text += [
        _scaled(fmt, "w"),
        _ints("behind_blocks", [2]),
        "by = Unsqueeze (w_scales, behind_blocks)",
        "scaled = Mul (blocks, by)",
        _ints("flat_shape", [0, -1]),
        "flat = Reshape (scaled, flat_shape)",
        _ints("begin", [0]),
        _ints("width", [cols]),
        _ints("columns", [1]),
        f"{out} = Slice (flat, begin, width, columns)",
    ]
    return "\n".join(text)


def _ints(name: str, values: Iterable[int]) -> str:
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()"


def _byte(name: str, value: int) -> str:
    return f"{name} = Constant <value = uint8 {{{value}}}> ()"


def _scaled(fmt: Format, p: str) -> str:
    """`p`_scales: block scales times the scale of the row, or the one there is."""
    if fmt.served and fmt.has_row_scales:
        return f"{p}_scales = Mul ({p}_of_blocks, {p}_of_row)"
    return f"{p}_scales = Identity ({p}_of_{'blocks' if fmt.served else 'row'})"


def _codes(fmt: Format, p: str, rows: int, width: int) -> list[str]:
    """`p`_words [R, lines, 4] uint8 -> `p`_codes [R, width]: a byte for each value, in order."""
    text = [_ints(f"{p}_codes_shape", [rows, width])]
    if fmt.bits == 8:
        return [*text, f"{p}_codes = Reshape ({p}_words, {p}_codes_shape)"]
    text.append(_byte(f"{p}_mask", 2**fmt.bits - 1))
    parts = []
    for part in range(8 // fmt.bits):
        text += [
            _byte(f"{p}_by{part}", part * fmt.bits),
            f'{p}_shifted{part} = BitShift <direction = "RIGHT"> ({p}_words, {p}_by{part})',
            f"{p}_part{part} = BitwiseAnd ({p}_shifted{part}, {p}_mask)",
        ]
        parts.append(f"{p}_part{part}")
    text += [
        f"{p}_parts = Concat <axis = 2> ({', '.join(parts)})",
        f"{p}_{'indices' if fmt.levels else 'codes'} = Reshape ({p}_parts, {p}_codes_shape)",
    ]
    if fmt.levels:
        table = ", ".join(str(level + 128) for level in fmt.levels)
        text += [
            f"{p}_levels = Constant <value = uint8[16] {{{table}}}> ()",
            f"{p}_whole = Cast <to = {_I32}> ({p}_indices)",
            f"{p}_codes = Gather <axis = 0> ({p}_levels, {p}_whole)",
        ]
    return text


def _fields(bits: int, p: str) -> list[str]:
    """`p`_codes [R, cols] -> `p`_stored [R, cols * bits / 8], the first value in the low bits."""
    if bits == 8:
        return [f"{p}_stored = Identity ({p}_codes)"]
    per = 8 // bits
    text = [
        _ints(f"{p}_fields_shape", [0, -1, per]),
        f"{p}_fields = Reshape ({p}_codes, {p}_fields_shape)",
    ]
    for i in range(per):
        text += [
            f"{p}_i{i} = Constant <value_int = {i}> ()",
            f"{p}_f{i} = Gather <axis = 2> ({p}_fields, {p}_i{i})",
        ]
        if i:
            text += [
                _byte(f"{p}_left{i}", i * bits),
                f'{p}_up{i} = BitShift <direction = "LEFT"> ({p}_f{i}, {p}_left{i})',
            ]
    sums = f"{p}_f0"
    for i in range(1, per):
        name = f"{p}_stored" if i == per - 1 else f"{p}_or{i}"
        text.append(f"{name} = BitwiseOr ({sums}, {p}_up{i})")
        sums = name
    return text


def _block_scales(fmt: Format, given: str, out: str, p: str) -> list[str]:
    """Scales as bytes [..., 1 or 2] -> `out` [...] in floats."""
    q = f"{p}_{fmt.scale}"
    if fmt.scale == "s8":
        return [
            f"{q}_last = Constant <value_ints = [-1]> ()",
            f"{q}_flat = Squeeze ({given}, {q}_last)",
            f"{q}_number = Cast <to = {_F32}> ({q}_flat)",
            f"{q}_half = Constant <value_float = 127.5> ()",
            f"{q}_whole = Constant <value_float = 256.0> ()",
            f"{q}_nothing = Constant <value_float = 0.0> ()",
            f"{q}_below = Greater ({q}_number, {q}_half)",
            f"{q}_less = Where ({q}_below, {q}_whole, {q}_nothing)",
            f"{out} = Sub ({q}_number, {q}_less)",
        ]
    return _number(given, out, q, size=2, fraction=10, bias=15)


def _floats(given: str, out: str, p: str) -> list[str]:
    """float32 as bytes [..., 4] -> `out` [...]."""
    return _number(given, out, f"{p}_f32", size=4, fraction=23, bias=127)


def _number(given: str, out: str, q: str, size: int, fraction: int, bias: int) -> list[str]:
    """Little-endian bytes of an IEEE number [..., size] -> `out`, by arithmetic in double."""
    weights = [256.0**i for i in range(size)]
    exponents = 2 ** (size * 8 - 1 - fraction)
    text = [
        f"{q}_wide = Cast <to = {_F64}> ({given})",
        f"{q}_weights = Constant <value = double[{size}] {{{', '.join(map(str, weights))}}}> ()",
        f"{q}_weighed = Mul ({q}_wide, {q}_weights)",
        f"{q}_axis = Constant <value_ints = [-1]> ()",
        f"{q}_bits = ReduceSum <keepdims = 0> ({q}_weighed, {q}_axis)",
    ]
    for name, value in (
        ("one", 1.0), ("two", 2.0), ("zero", 0.0), ("half", 2.0 ** (size * 8 - 1)),
        ("steps", 2.0**fraction), ("bias", float(bias)),
        ("subnormal", 2.0 ** (1 - bias - fraction)),
        ("exponents", float(exponents)),
    ):  # fmt: skip
        text.append(f"{q}_{name} = Constant <value = double {{{value!r}}}> ()")
    return [
        *text,
        f"{q}_sign_part = Div ({q}_bits, {q}_half)",
        f"{q}_sign_bit = Floor ({q}_sign_part)",
        f"{q}_sign_two = Mul ({q}_sign_bit, {q}_two)",
        f"{q}_sign = Sub ({q}_one, {q}_sign_two)",
        f"{q}_above = Div ({q}_bits, {q}_steps)",
        f"{q}_top = Floor ({q}_above)",
        f"{q}_sign_top = Mul ({q}_sign_bit, {q}_exponents)",
        f"{q}_exponent = Sub ({q}_top, {q}_sign_top)",
        f"{q}_whole = Mul ({q}_top, {q}_steps)",
        f"{q}_fraction = Sub ({q}_bits, {q}_whole)",
        f"{q}_part = Div ({q}_fraction, {q}_steps)",
        f"{q}_mantissa = Add ({q}_part, {q}_one)",
        f"{q}_power = Sub ({q}_exponent, {q}_bias)",
        f"{q}_scale = Pow ({q}_two, {q}_power)",
        f"{q}_normal = Mul ({q}_mantissa, {q}_scale)",
        f"{q}_tiny = Mul ({q}_fraction, {q}_subnormal)",
        f"{q}_least = Equal ({q}_exponent, {q}_zero)",
        f"{q}_size = Where ({q}_least, {q}_tiny, {q}_normal)",
        f"{q}_value = Mul ({q}_sign, {q}_size)",
        f"{out} = Cast <to = {_F32}> ({q}_value)",
    ]
