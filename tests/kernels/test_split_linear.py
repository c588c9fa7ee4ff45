"""Tiles and splits of the products with quantised weights: by the table, and by the layer alone."""

import itertools

import pytest

from octavo.kernels.launch import LINEAR_SIZES, LINEARS, TABLE
from octavo.kernels.split_linear import count_tiles, linear_launch, linear_size, split_size

H100 = 132


def test_every_architecture_has_a_row() -> None:
    assert set(LINEARS["int4"]) == set(TABLE["chunk"])
    assert set(LINEARS["fp8"]) == {"sm_90", "sm_100", "other"}, "e4m3 products are theirs alone"
    for rows in LINEARS.values():
        for arch, sizes in rows.items():
            assert tuple(sizes) == LINEAR_SIZES
            tokens = [each.block_m for each in sizes.values()]
            assert tokens == sorted(tokens) and tokens[0] == 16
            for each in sizes.values():
                if arch == "sm_90":
                    assert each.block_n >= 16 * each.num_warps, "four warps have 64 of wgmma's rows"


@pytest.mark.parametrize(
    ("n", "out_size", "expected"),
    [
        (1, 3584, "few"), (16, 3584, "few"), (17, 3584, "some"), (32, 37_888, "some"),
        (33, 37_888, "more"), (65, 3584, "more"), (256, 3584, "more"),
        (320, 3584, "many"), (512, 3584, "many"), (512, 1280, "more"),
        (512, 37_888, "wide"),
        (1280, 3584, "wide"), (1152, 3584, "many"),  # 140 and 126 wide tiles
    ],
)  # fmt: skip
def test_tiles_by_the_number_of_rows(n: int, out_size: int, expected: str) -> None:
    assert linear_size("int4", "sm_90", n, out_size, H100) == expected


def test_a_split_follows_from_the_layer_alone() -> None:
    """7B's o and down: 56 tiles of 64 outputs, so 4 splits, if each has 512 inputs."""
    for n in (1, 16, 17, 64):
        assert split_size(n, 3584, 3584, 256, H100) == 4, n  # 4 + 4 + 4 + 2 of 14
        assert split_size(n, 18_944, 3584, 128, H100) == 37, n
    assert split_size(65, 3584, 3584, 256, H100) == 14
    assert split_size(1, 896, 3584, 128, H100) == 7, "896 inputs are not two times 512"
    assert split_size(1, 3584, 37_888, 256, H100) == 14, "592 tiles are enough"
    assert split_size(1, 100, 72, 128, H100) == 1


@pytest.mark.parametrize("kernel", LINEARS)
def test_a_few_rows_give_every_processor_work(kernel: str) -> None:
    """Decode of the 7B and the 72B, up to 64 rows."""
    layers = ((3584, 4608), (3584, 3584), (18_944, 3584), (8192, 8192), (29_568, 8192))
    for n, (in_size, out_size) in itertools.product((1, 32, 64), layers):
        chosen = linear_launch(kernel, "sm_90", n, out_size, H100)
        splits = -(-in_size // 256 // split_size(n, in_size, out_size, 256, H100))
        assert count_tiles(chosen, n, out_size) * splits >= 0.95 * H100
