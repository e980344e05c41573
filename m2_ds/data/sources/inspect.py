"""Looking at a data set from the console: what it holds, and whether its files are whole."""

from collections import Counter

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from m2_ds.data.progress import track
from m2_ds.data.reader import Dataset, open_dataset


def show_counts(dataset: Dataset) -> None:
    """Print the pictures, groups and captions of every split."""
    table = Table("split", "pictures", "groups", "captions", "sources", title=f"{dataset.name} in {dataset.folder}")
    for name, info in dataset.manifest.splits.items():
        groups = {row["group"] for row in dataset.split(name).iter(columns=["group"])}
        table.add_row(
            name,
            f"{info.rows:,}",
            f"{len(groups):,}",
            ", ".join(f"{count:,} {language}" for language, count in info.languages.items()),
            ", ".join(info.sources),
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def inspect(folder: Positional[str], *, samples: int = 3) -> None:
    """Print what a data set holds: counts, kinds of captions, sizes, licences, and a few records of every split.

    Args:
        folder: the data set's folder, with its manifest.json, or its URL.
        samples: records shown of every split.
    """
    dataset = open_dataset(folder)
    show_counts(dataset)
    for name in dataset.splits:
        split = dataset.split(name)
        kinds: Counter[str] = Counter()
        licenses: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        negatives = 0
        for row in split.iter(columns=["captions", "license", "width", "height", "hard_negatives"]):
            kinds.update(caption["kind"] for caption in row["captions"])
            licenses[row["license"]] += 1
            sizes[f"{row['width']}x{row['height']}"] += 1
            negatives += len(row["hard_negatives"] or ())
        print(f"\n{name}: captions {_shown(kinds)}; hard negatives {negatives:,}; licences {_shown(licenses)}")
        print(f"  sizes {_shown(sizes)}")
        for record in split.read(range(min(samples, len(split)))):
            print(f"  {record.key} ({record.width}x{record.height}, {len(record.image):,} bytes, group {record.group})")
            for caption in record.captions:
                print(f"    [{caption.language}, {caption.kind}, {caption.weight:g}] {caption.text}")


def _shown(counts: Counter[str], most: int = 5) -> str:
    parts = [f"{name} {count:,}" for name, count in counts.most_common(most)]
    return ", ".join(parts) + (f" and {len(counts) - most} more" if len(counts) > most else "")


def verify(folder: Positional[str]) -> None:
    """Read every shard of a data set and compare its checksum with the manifest's.

    Args:
        folder: the data set's folder, with its manifest.json, or its URL.

    Raises:
        ValueError: the first shard that is missing, cut short or changed, by name.
    """
    dataset = open_dataset(folder)
    shards = [shard for name in dataset.splits for shard in dataset.index(name)]
    for shard in track(shards, "verifying", total=len(shards)):
        dataset.verify_shard(shard)
    print(f"{folder}: {len(shards)} shards are whole")
