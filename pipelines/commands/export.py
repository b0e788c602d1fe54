"""``moeify export``: what leaves a run."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.commands.arguments import RUN, check_category, examples
from pipelines.commands.options import JSON

if TYPE_CHECKING:
    from moeify.export.model_card import About, Checked
    from moeify.export.publish import Dtype
    from moeify.export.speeds import Speeds
    from moeify.export.stock import Form
    from pipelines.runs import RunFolder


@click.command(
    "export",
    epilog=examples(
        "moeify export last --category law -o law-model",
        "moeify export last --category law --onnx -o law-onnx",
        "moeify export last --split --without law -o without-law",
        "moeify export last --without law --recover 50 -o without-law",
        "moeify export last --moe glm4_moe --joint 64 --dtype bfloat16 -o mixture",
        "moeify export last --category law --speed -o law-model",
    ),
)
@RUN
@click.option("--category", "keep", multiple=True, metavar="NAME", help="This category alone; may be repeated.")
@click.option(
    "--without", "drop", multiple=True, metavar="NAME", help="Take out this category's own experts; may be repeated."
)
@click.option(
    "--recover",
    metavar="STEPS",
    type=click.IntRange(min=1),
    help="With --without: then train on, on the other categories' data.",
)
@click.option("--split", is_flag=True, help="The split model, for moeify.load_split.")
@click.option(
    "--moe", type=click.Choice(["glm4_moe", "granitemoeshared"]), help="A mixture of experts that transformers loads."
)
@click.option("--force", metavar="NAME", help="With --moe: no routers; this category's expert runs.")
@click.option(
    "--joint",
    metavar="STEPS",
    type=click.IntRange(min=1),
    help="With --moe: first network and routers learn together.",
)
@click.option("--gguf", is_flag=True, help="For llama.cpp: a dense model or --moe as one file.")
@click.option("--onnx", is_flag=True, help="For onnxruntime: a dense model as one graph, whatever its network.")
@click.option("--cache", is_flag=True, help="With --onnx: keys and values of earlier tokens go in and out.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights in the files.",
)
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare with the split model before it is there."
)
@click.option("--speed", is_flag=True, help="Time it against the dense model, and against what its saved work allows.")
@click.option("--register", is_flag=True, help="Log it to MLflow and register it, with an alias.")
@click.option(
    "--out", "-o", "target", required=True, metavar="DIR", help="A folder that is new or empty, or a URL of one."
)
@JSON
def command(
    run_: str,
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    recover: int | None,
    split: bool,
    moe: "Form | None",
    force: str | None,
    joint: int | None,
    gguf: bool,
    onnx: bool,
    cache: bool,
    dtype: "Dtype",
    verify: bool,
    speed: bool,
    register: bool,
    target: str,
    as_json: bool,
) -> None:
    """Write RUN's model, or a part of it, to a folder.

    \b
    --category NAME               a smaller dense model of that category's route;
                                  with --onnx or --gguf as one file
    --split                       the whole split model
    --moe FORMAT                  the whole split model, for plain transformers,
                                  with routers for text without labels
    --category A --category B     with --split or --moe: those categories and
                                  what serves them, nothing else
    --without NAME                as --split or --moe, all categories, but NAME
                                  runs on what others share with it

    A dense model of several categories would run units for each of them that the split model does not run, and give
    other outputs: it is written only where they share one route.

    --moe reads the run's data again to train its routers, one in each layer; the README says what routing without
    labels costs. With --force NAME it reads no data: every token runs that category's expert. Routers of a network that
    never learned with them cost a lot: --joint trains both for so many steps first, a tenth of the run's, say. The
    README says what these did for the dense twin.

    --recover reads the run's data again, and trains what is left by the recipe's settings on train rows of categories
    that keep their experts. The README says what that took, and what it did to every category's validation loss.

    --speed takes a minute or so: tokens a second of reading prompts and of adding tokens, with one row and with 32, or
    rows a second where the model writes no text. An ONNX graph is timed at reading alone. The figures go to the
    model card and to speed.json, too, and RUN keeps them for its report.

    --register makes it a version of the model that is named as RUN's recipe, with an alias such as 'python-only',
    'moe', 'split' or 'without-web'. Where MLflow is away, 'moeify sync RUN' does so later.
    """
    from moeify.place import is_url
    from pipelines import copies, runs
    from pipelines.outlet import outlet
    from pipelines.show import summary

    _refuse_odd(keep, drop, split, moe, force, gguf, onnx)
    if cache and (speed or not onnx):
        raise click.UsageError("--cache is for --onnx, which --speed times without one")
    if recover and not drop:
        raise click.UsageError("--recover is for --without NAME")
    if joint and (not moe or force or keep or drop):
        raise click.UsageError("--joint is for --moe, with all categories and without --force")
    folder = runs.find(run_, runs.home())
    known = summary(folder)
    if known["status"] != "finished":
        raise ValueError(f"run {folder.id} is {known['status']}, wanted a finished one; see 'moeify resume'")
    for category in [*keep, *drop, *([force] if force else [])]:
        check_category(category, known["categories"])
    with outlet(target) as out:
        from moeify.export.publish import How, export_dense, export_moe, export_split
        from pipelines.recovered import joint_on, recovery_on, routers_on

        copies.fetch_checkpoint(folder)
        recovery = recovery_on(folder, recover) if recover else None
        if recover:
            click.echo(f"training on for {recover:,} steps ...", err=True)
        how = How(dtype, gguf=gguf, onnx=onnx, cache=cache, verify=verify, speed=speed, about=_about(folder))
        if moe:
            distil = None if force else routers_on(folder)
            if distil:
                click.echo(f"training on for {joint:,} steps ..." if joint else "training routers ...", err=True)
            join = joint_on(folder, joint) if joint else None
            mixture = partial(export_moe, forced=force, distil=distil, join=join)
            done = mixture(folder.path, moe, out, how, keep=keep, drop=drop, recover=recovery)
        elif split or drop:
            done = export_split(folder.path, out, how, keep=keep, drop=drop, recover=recovery)
        else:
            done = export_dense(folder.path, keep, out, how)
    alias = _alias(keep, drop, moe, how.file, recover, joint)
    if done.speed:
        _keep_speed(folder, alias, how.file or moe or ("split" if split or drop else "dense"), done.speed)
    if as_json:
        from pipelines.show import to_json

        click.echo(to_json({"run": folder.id, "out": target, "dtype": dtype, **done.as_json()}))
    else:
        _tell(done, target, moe, dtype)
    if register:
        out_ = target if is_url(target) else str(Path(target).absolute())
        _register(folder, out_, alias, quiet=as_json)


def _tell(done: "Checked", target: str, moe: "Form | None", dtype: "Dtype") -> None:
    click.echo(f"wrote {target}")
    if moe and done.routers is None:
        click.echo(f"every token runs the expert of one category; {target}/README.md says which, and how to change it")
    if done.routers is not None:
        click.echo(
            f"its routers choose for every token: test loss {done.routers.router_tax:+.2%} against routing by label; "
            f"{target}/README.md says more, and how to force a category"
        )
    if done.recovery is not None:
        from pipelines.recovered import told

        click.echo(told(done.recovery))
    if done.rounding is not None:
        click.echo(f"rounding to {dtype} moves outputs by up to {done.rounding:.1e}")
    if done.differences:
        most, model = max(done.differences.values()), "recovered" if done.recovery else "split"
        click.echo(f"equal to the {model} model within {most:.1e}: {', '.join(done.differences)}")
    if done.speed:
        from pipelines.speed_table import print_speeds

        print_speeds(done.speed, sys.stdout)


def _alias(
    keep: Sequence[str],
    drop: Sequence[str],
    moe: str | None,
    file: str | None,
    recover: int | None,
    joint: int | None,
) -> str:
    """Return the alias of an export: what it is, then what is in it or left out."""
    from pipelines.mlflow_models import alias_of

    words = ["moe"] if moe else []
    words += [f"{'-'.join(keep)}-only"] if keep else []
    words += [f"without-{'-'.join(drop)}"] if drop else []
    words += ["recovered"] if recover else []
    words += ["joint"] if joint else []
    return alias_of("-".join([*(words or ["split"]), *([file] if file else [])]))


def _keep_speed(folder: "RunFolder", alias: str, form: str, speeds: "Speeds") -> None:
    """Keep what was timed beside the run, and have its report show it; the export is done, whatever comes of it."""
    from pipelines import copies
    from pipelines.kept_speeds import keep_speed, path_of
    from pipelines.report.page import write_or_warn

    try:
        keep_speed(folder, alias, form, speeds)
    except (ValueError, OSError) as error:
        click.echo(f"moeify: warning: what was timed is not in the run's report: {error}", err=True)
        return
    write_or_warn(folder)
    copies.publish(folder, path_of(folder), folder.plots, folder.report)


def _register(folder: "RunFolder", out: str, alias: str, *, quiet: bool) -> None:
    """Say in the run's journal that the export is to be registered, and deliver that; ``quiet`` keeps stdout clean."""
    import time

    from moeify.events import Exported
    from moeify.recipe.load import load_recipe
    from pipelines.mlflow_store import DeliveryError
    from pipelines.tracking import deliver
    from pipelines.url_journal import journal_of

    config, now = load_recipe(folder.resolved), time.time()
    with journal_of(folder) as journal:
        journal.emit(Exported(id=f"exported/{alias}/{now:.3f}", time=now, folder=out, alias=alias))
    try:
        deliver(folder, config)
    except DeliveryError as error:
        click.echo(f"moeify: warning: {error}; register it later with: moeify sync {folder.id}", err=True)
    else:
        click.echo(f"registered as {config.name}@{alias}", err=quiet)


def _refuse_odd(
    keep: Sequence[str], drop: Sequence[str], split: bool, moe: str | None, force: str | None, gguf: bool, onnx: bool
) -> None:
    if not (keep or drop or split or moe):
        raise click.UsageError("say what to export: --category NAME, --split, --moe FORMAT or --without NAME")
    if keep and drop:
        raise click.UsageError("give either --category or --without")
    if split and moe:
        raise click.UsageError("give either --split or --moe")
    if force and not moe:
        raise click.UsageError("--force is for --moe")
    if gguf and (split or (drop and not moe)):
        raise click.UsageError("--gguf is for --category NAME or --moe; only moeify loads a split model")
    if onnx and (split or moe or drop or gguf):
        raise click.UsageError("--onnx is for --category NAME, alone; a graph has no routes")
    for name in (*keep, *drop):
        if (*keep, *drop).count(name) > 1:
            raise click.UsageError(f"{name!r} is named twice")


def _about(folder: "RunFolder") -> "About":
    from moeify.export.model_card import About
    from moeify.recipe.load import load_recipe
    from moeify.result import Result
    from pipelines.versions import package_version

    return About(
        run=folder.id,
        recipe=load_recipe(folder.resolved),
        result=Result.model_validate_json(folder.result.read_bytes()),
        moeify=package_version(),
    )
