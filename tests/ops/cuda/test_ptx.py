"""The assembly of ``ptx.cuh``, which the emulator replaces: read and computed here.

Source: PTX ISA 8.5, "cvt" and "mma".
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch

from featup_hub.ops.cuda import programs

TEXT = Path(programs.__file__).parent.joinpath("csrc", "ptx.cuh").read_text(encoding="utf-8")


def half(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]


def bfloat(value: float) -> int:
    bits = torch.tensor([value], dtype=torch.bfloat16).view(torch.int16).item()
    return int(bits) & 0xFFFF


# What an instruction makes of its operands. A pair's first operand becomes the upper half.
INSTRUCTIONS = {
    "cvt.f32.f16": lambda a: struct.unpack("<e", struct.pack("<H", a))[0],
    "cvt.rn.f16.f32": half,
    "cvt.rn.f16x2.f32": lambda a, b: half(a) << 16 | half(b),
    "cvt.rn.bf16x2.f32": lambda a, b: bfloat(a) << 16 | bfloat(b),
}


def call(name: str, **arguments: float) -> float:
    """Runs a function of one instruction: operand %1 is the first that the code binds."""
    body = re.search(rf"{name}\(.*?\n\}}", TEXT, re.DOTALL)
    assert body is not None
    instruction, operands, inputs = re.findall(
        r'asm\("(\S+) ([^;]*);" : "=\w"\(\w+\) : (.*)\);', body[0]
    )[0]
    bound = [arguments[word] for word in re.findall(r"\((\w+)\)", inputs)]
    used = [bound[int(n) - 1] for n in re.findall(r"%(\d)", operands)[1:]]
    return INSTRUCTIONS[instruction](*used)


def test_halves_are_widened_and_rounded():
    assert call("half_to_float", bits=0x3E00) == 1.5
    assert call("float_to_half", value=1.5) == 0x3E00


@pytest.mark.parametrize(
    ("name", "bits"), [("floats_to_halfs", half), ("floats_to_bfloats", bfloat)]
)
def test_of_a_pair_the_first_number_is_the_lower_half(name, bits):
    assert callable(bits)
    assert call(name, low=1.5, high=-2.0) == bits(-2.0) << 16 | bits(1.5)


def test_a_product_adds_to_its_sums_and_takes_its_operands_in_order():
    macro = re.search(r"#define MULTIPLY.*?b\[1\]\)\)", TEXT, re.DOTALL)
    assert macro is not None
    text = "".join(re.findall(r'"([^"]*)"', macro[0]))
    assert text.startswith("mma.sync.aligned..row.col.f32...f32 ")
    assert re.findall(r'void (\w+)\([^{]*{\n    MULTIPLY\("(\w+)", "(\w+)"\);\n}', TEXT) == [
        ("multiply_halfs", "m16n8k16", "f16"),
        ("multiply_bfloats", "m16n8k16", "bf16"),
        ("multiply_tf32", "m16n8k8", "tf32"),
    ]
    bound = re.findall(r'"(\+f|r)"\((\w+\[\d\])\)', macro[0])
    assert [name for _, name in bound] == [
        *(f"sum[{i}]" for i in range(4)),
        *(f"a[{i}]" for i in range(4)),
        *(f"b[{i}]" for i in range(2)),
    ]
    sums, left, right = "{%0, %1, %2, %3}", "{%4, %5, %6, %7}", "{%8, %9}"
    assert f"{sums}, {left}, {right}, {sums};" in text


def test_no_compiler_may_move_a_product_into_a_branch():
    assert re.findall(r"asm( volatile)?\(\"mma", TEXT) == [" volatile"]
