"""A picture of a paged cache. Needs matplotlib."""

from collections.abc import Callable, Mapping

from attention import PagedKVCache


def plot_pages(axes, cache: PagedKVCache, owners: Mapping[str, tuple[int, str]], letter: Callable[[int], str],
               title: str):  # fmt: skip
    """The pages of `cache` in memory order, coloured by the sequences that own them; returns the axes.

    owners: name of each sequence to draw -> (sequence, colour); a page of several is divided among their colours
    letter: what to write into a slot that is in use
    """
    from matplotlib.patches import Rectangle

    size, holders = cache.page_size, {name: one for name, one in owners.items() if one[0] in cache.sequences}
    for page in range(cache.num_pages):
        here = [one for one in holders.values() if page in cache.pages(one[0])]
        for row, (_, colour) in enumerate(here):
            place = (page * size, row / len(here))
            axes.add_patch(Rectangle(place, size, 1 / len(here), color=colour, alpha=0.35, linewidth=0))
        used = max((cache.length(one) - cache.pages(one).index(page) * size for one, _ in here), default=0)
        for slot in range(page * size, (page + 1) * size):
            axes.add_patch(Rectangle((slot, 0), 1, 1, fill=False, edgecolor="white", linewidth=1))
            if slot - page * size < used:
                axes.text(slot + 0.5, 0.45, letter(slot), ha="center", va="center", family="monospace")
        edge = "black" if here else "#bbbbbb"
        axes.add_patch(Rectangle((page * size, 0), size, 1, fill=False, edgecolor=edge, linewidth=1))
    middles = [(page + 0.5) * size for page in range(cache.num_pages)]
    axes.set(xlim=(-0.1, cache.num_pages * size + 0.1), ylim=(-0.04, 1.04), yticks=[])
    axes.set_xticks(middles, range(cache.num_pages), color="#8c8c8c", fontsize=8)
    tables = "    ".join(f"{name} = {list(cache.pages(sequence))}" for name, (sequence, _) in holders.items())
    axes.set_title(f"{title}        block tables: {tables}", loc="left", fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=1)
    return axes
