"""Loads by layers: which tensors are needed together, in which order, and how a load is cut by it.

A slot lies tensor by tensor, so that some layers are a strip of every slot: a load by layers is
the same load once for each *band* of layers, one behind the other in one job. A stream that waits
for a layer waits for its band alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

from triton_offload.kernels.arguments import as_integer, shown
from triton_offload.transfer.layout import CacheLayout, GroupLayout, GroupRun, listed, named_members

# A band more costs its caller a segment, some 40 us (assumed, as in `paths.staged`), in which the
# link of an H100 moves 2 MiB: with bands of 3 MiB and more it never waits for the caller.
LEAST_BYTES = 3 << 20

# Where the model computes as fast as its pages come, the last band's layers are computed when all
# else is done: a sixteenth of the step. More bands would gain less than their segments cost.
MOST_BANDS = 16

#: blocks for some layouts of groups what can be done ahead of their first transfer
Prepare = Callable[[Iterable[GroupLayout]], None]


class _Bands(NamedTuple):
    """`groups[b]`: of each group that has tensors in band b, by its index, those tensors alone.
    `of_layer[i]`: the band of layer i."""

    groups: list[dict[int, GroupLayout]]
    of_layer: list[int]


class Layers:
    """Tensors of a cache by the layers that need them, in the order in which layers are computed.

    `tensors[i]`: indices of the tensors of layer i. Together they are all the tensors of the groups
    that are loaded, each once. A tensor that several groups share brings the pages of them all.
    """

    def __init__(self, layout: CacheLayout, tensors: Sequence[Sequence[int]]) -> None:
        self._layout = layout
        self._tensors = tuple(map(tuple, tensors))
        size_of = {
            i: page.page_bytes
            for group, members in zip(layout.groups, layout.members, strict=True)
            for i, page in zip(members, group.table.pages, strict=True)
        }
        self._sizes = [sum(size_of.get(i, 0) for i in layer) for layer in self._tensors]
        self._bands: dict[int, _Bands] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def cut(self, runs: list[GroupRun], prepare: Prepare) -> tuple[list[GroupRun], tuple[int, ...]]:
        """A job's runs, band by band, and of each layer the run after which its pages are there.

        The first band is one layer, so that it comes early; the others are of about equal size,
        the more of them the larger the load is. A load below 6 MiB stays as it is. `prepare` is
        called where there were no such bands before.
        """
        number = _num_bands(sum(run.num_bytes for run in runs))
        if number == 1:
            return runs, (max(0, len(runs) - 1),) * len(self)
        bands = self._bands.get(number)
        if bands is None:
            bands = self._make(number)
            prepare(group for groups in bands.groups for group in groups.values())
            self._bands[number] = bands  # where that raised, it is tried again
        made: list[GroupRun] = []
        last: list[int] = []
        for groups in bands.groups:
            for run in runs:
                group = groups.get(run.group.index)
                if group is not None:
                    made.append(run._replace(group=group))
            last.append(max(0, len(made) - 1))  # of a band with nothing to load: the one before
        return made, tuple(last[band] for band in bands.of_layer)

    def _make(self, number: int) -> _Bands:
        """One layer, and the rest in `number` bands at most, none of them empty."""
        goal = max(1, sum(self._sizes[1:])) / number
        of_layer, before, place = [0], 0, -1
        for size in self._sizes[1:]:
            was, place = place, int((before + size / 2) / goal)  # a layer is where its middle lies
            of_layer.append(of_layer[-1] + (place > was))
            before += size
        members: list[set[int]] = [set() for _ in range(of_layer[-1] + 1)]
        for tensors, band in zip(self._tensors, of_layer, strict=True):
            members[band].update(tensors)
        return _Bands([self._groups_of(tensors) for tensors in members], of_layer)

    def _groups_of(self, tensors: set[int]) -> dict[int, GroupLayout]:
        """Each group's layout of these of its tensors, in the same slots."""
        found = {}
        for group, members in zip(self._layout.groups, self._layout.members, strict=True):
            pages = group.table.pages
            refs = [(row, pages[row].page_bytes) for row, i in enumerate(members) if i in tensors]
            if refs:
                found[group.index] = GroupLayout.of(
                    group.index, group.table.group(refs), group.size
                )
        return found


class NamedLayers:
    """Reads what a load was told of layers, for a cache whose tensors have these names (None: they
    go by their indices).

    Of each group the division that was given last is kept, for engines give the same every time.
    """

    def __init__(self, layout: CacheLayout, names: Iterable[str] | None) -> None:
        self._layout = layout
        known: Iterable[int | str] = range(1 + max(map(max, layout.members)))
        self._index = {name: i for i, name in enumerate(known if names is None else names)}
        self._kept: dict[int, tuple[object, Layers, Mapping[int | str, int]]] = {}

    def read(
        self, layers: SupportsIndex | Sequence[Sequence[int | str]] | None, group: int
    ) -> tuple[Layers | None, Mapping[int | str, int]]:
        """The layers of a group, and the number of each by what it may be called: that number, or
        the name of a tensor. Raises ValueError that says what is wrong with `layers`."""
        if layers is None:
            return None, {}
        key: object
        if isinstance(layers, SupportsIndex):
            key = as_integer("layers", layers, 1)
        else:
            key = tuple(
                tuple(listed(f"layers[{i}]", layer))
                for i, layer in enumerate(listed("layers", layers))
            )
        kept = self._kept.get(group)
        if kept is None or kept[0] != key:
            tensors = self._tensors(key, group)
            layer_of = {i: number for number, layer in enumerate(tensors) for i in layer}
            numbers: dict[int | str, int] = {number: number for number in range(len(tensors))}
            for name, i in self._index.items():
                if isinstance(name, str) and i in layer_of:
                    numbers[name] = layer_of[i]
            kept = self._kept[group] = key, Layers(self._layout, tensors), numbers
        return kept[1], kept[2]

    def _tensors(self, layers: Any, group: int) -> list[list[int]]:
        members = self._layout.members[group]
        if isinstance(layers, int):
            if len(members) % layers:
                raise ValueError(
                    f"layers: expected a divisor of {len(members)}, the group's tensors, "
                    f"got {layers}"
                )
            size = len(members) // layers
            return [list(members[i : i + size]) for i in range(0, len(members), size)]
        found = [
            named_members(f"layers[{i}]", layer, self._index) for i, layer in enumerate(layers)
        ]
        if sorted(i for layer in found for i in layer) != sorted(members) or [] in found:
            names = list(self._index)
            raise ValueError(
                f"layers: expected each of {[names[i] for i in members]} in one layer, and no "
                f"layer without any, got {shown(layers)}"
            )
        return found


def _num_bands(num_bytes: int) -> int:
    """Beside the first one, which is one layer. A power of two, so that few divisions are made."""
    number = MOST_BANDS
    while number > 1 and num_bytes < number * LEAST_BYTES:
        number //= 2
    return number
