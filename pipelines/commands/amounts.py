"""What a look at texts found, as a table."""

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from moeify.data.survey import Survey
    from moeify.starter import Starter


def amounts(found: "Survey", made: "Starter") -> dict[str, Any]:
    """Return the same for programs; documents and bytes are known where documents have categories."""
    known = found.amounts if found.labelled else {}
    categories = {
        name: {
            "train_tokens": tokens,
            "documents": known[name].documents if name in known else None,
            "bytes": known[name].size if name in known else None,
        }
        for name, tokens in zip(made.categories, made.train_tokens, strict=True)
    }
    return {"categories": categories, "steps": made.config.training.steps, "minutes": round(made.minutes, 1)}


def print_amounts(found: "Survey | None", made: "Starter") -> None:
    """Print documents and tokens of each category; images, where no texts were looked at."""
    from pipelines.tables import console_for, table_for

    console = console_for(sys.stdout)
    if found and found.labelled:
        table = table_for(console, "category", "documents", "MB", "tokens to train on")
        for category, tokens in zip(made.categories, made.train_tokens, strict=True):
            amount = found.amounts[category]
            table.add_row(category, f"{amount.documents:,}", f"{amount.size / 1e6:.2f}", f"{tokens:,}")
    else:
        table = table_for(console, "category", f"{'tokens' if found else 'images'} to train on")
        for category, tokens in zip(made.categories, made.train_tokens, strict=True):
            table.add_row(category, f"{tokens:,}")
    click.echo()
    console.print(table)
