"""Weight magnitude: ``sum |w|`` over the weights of a structure. The oldest baseline."""

from collections.abc import Sequence

import torch

from gisp_hf.criteria.base import Criterion, Sums, share_out, sum_to_entries
from gisp_hf.models.layout import Layout
from gisp_hf.models.shards import local_rows


class Magnitude(Criterion):
    """``sum |w|``; with the normalisation ``params`` that is the mean size of a structure's weights. Reads no data."""

    needs = "weights"

    def sums(self, layout: Layout, blocks: Sequence[int]) -> Sums:
        found: dict[tuple[int, str], torch.Tensor] = {}
        for number in blocks:
            block = layout.blocks[number]
            for member in block.members:
                rows = local_rows(self.model.get_parameter(member.parameter).detach())
                entries = sum_to_entries(
                    rows.tensor.abs().float(), member.dim, first_row=rows.first, total_rows=rows.total
                )
                part = share_out(entries, member, block.size)
                key = number, member.parameter
                found[key] = found[key] + part if key in found else part
        return found
