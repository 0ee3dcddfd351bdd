"""``moec inspect``: what is inside a bundle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.artifacts.sizes import human_bytes
from moec.cli.options import bundle_argument, json_option
from moec.cli.output import print_json, print_table, write_page

if TYPE_CHECKING:
    from moec.artifacts.files.bundle import Bundle
    from moec.artifacts.model import ModelRecord


@click.command("inspect", short_help="Show what a bundle holds.")
@bundle_argument
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page: where experts lie, which follow which, memory and predicted speed over budgets.",
)
@json_option
def command(bundle: Path, html: Path | None, as_json: bool) -> None:
    """Show what BUNDLE holds: model, steps, experts, sizes for each target, schedules.

    \b
    Example:
      moec inspect tiny.moec --html tiny.html
    """
    from moec.artifacts.files.reader import open_bundle

    opened = open_bundle(bundle, verify="sizes")
    if html is not None:
        from moec.cli.pages.bundle import bundle_page

        write_page(html, bundle_page(opened))
    facts = describe(opened)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything that the command shows, as JSON values."""
    from moec.artifacts.accuracy import read_accuracy
    from moec.artifacts.files.codec import to_json
    from moec.artifacts.layout.experts import layout
    from moec.artifacts.states import state_bytes

    model, manifest = bundle.model, bundle.manifest
    bodies = {body.name: body for body in model.bodies}
    sizes = {name: record.size_bytes for name, record in manifest.files.items()}
    return {
        "model": manifest.model_name,
        "class": model.class_name,
        "model_type": model.model_type,
        "dtype": model.dtype,
        "max_context": model.max_context,
        "vocab_size": model.vocab_size,
        "fingerprint": manifest.fingerprint,
        "made_by": {"moec": manifest.moec_version, **manifest.tools},
        "quantization": manifest.quantization,
        "formats": manifest.formats,
        "fit": to_json(manifest.fit),
        "checkpoint_types": manifest.checkpoint_types,
        "bytes": sum(sizes.values()),
        "dense_bytes": sizes.get("weights/dense.safetensors", 0),
        "targets": [
            {
                "name": target.name,
                "architectures": list(target.architectures),
                "cpu_features": list(target.cpu_features),
                "bytes": sum(sizes[name] for name in target.files),
            }
            for target in manifest.targets
        ],
        "segments": _segments(model),
        "attentions": [to_json(attention) for attention in model.attentions],
        "states": [to_json(state) | {"bytes": state_bytes(state)} for state in model.states],
        "bodies": [to_json(body) | {"expert_bytes": layout(body).expert_bytes} for body in model.bodies],
        "experts": [
            {
                "module": layer.module,
                "experts": layer.experts,
                "top_k": layer.top_k,
                "body": layer.body,
                "bytes": layer.experts * layout(bodies[layer.body]).stride_bytes,
            }
            for layer in model.experts
        ],
        "profile": {
            "provenance": bundle.schedule.profile.provenance,
            "tokens": bundle.schedule.profile.tokens,
            "sequences": bundle.schedule.profile.sequences,
        },
        "schedules": [to_json(schedule) for schedule in bundle.schedule.schedules],
        "accuracy": [to_json(comparison) for comparison in read_accuracy(bundle).comparisons],
    }


def _segments(model: ModelRecord) -> list[dict[str, Any]]:
    uses: Counter[str] = Counter()
    side: set[str] = set()
    for step in model.all_steps:
        if step.kind == "segment":
            uses[step.function] += 1
            if step.side:
                side.add(step.function)
    return [
        {
            "name": function.name,
            "uses": uses[function.name],
            "side": function.name in side,
            "inputs": len(function.inputs),
            "weights": len(function.weights),
            "outputs": len(function.outputs),
        }
        for function in model.functions
    ]


def _print(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['model']}: {facts['class']}, {facts['dtype']}, context {facts['max_context']} tokens")
    click.echo(
        f"{human_bytes(facts['bytes'])} in all, {human_bytes(facts['dense_bytes'])} of it dense weights"
    )
    click.echo(f"weights (quantization {facts['quantization']}): {_sizes(facts['formats'])}")
    if facts["fit"] is not None:
        _print_fit(facts["fit"])
    click.echo(f"made of a checkpoint of {_sizes(facts['checkpoint_types'])}")
    click.echo("made by " + ", ".join(f"{name} {version}" for name, version in facts["made_by"].items()))
    click.echo("\ntargets")
    print_table(
        ("name", "for", "size"),
        [(t["name"], " ".join(t["architectures"]), human_bytes(t["bytes"])) for t in facts["targets"]],
    )
    click.echo("\nsegments (side: may overlap with fetching experts)")
    print_table(
        ("name", "uses", "inputs", "weights", "outputs", "side"),
        [
            (s["name"], s["uses"], s["inputs"], s["weights"], s["outputs"], "yes" * s["side"])
            for s in facts["segments"]
        ],
    )
    click.echo("\nattention")
    print_table(
        ("name", "query heads", "kv heads", "key", "value", "sees", "cached"),
        [
            (
                a["name"],
                a["query_heads"],
                a["kv_heads"],
                a["key_dim"],
                a["value_dim"],
                _sees(a),
                _cached(a),
            )
            for a in facts["attentions"]
        ],
    )
    if facts["states"]:
        click.echo("\nstates (instead of a cache)")
        print_table(
            ("name", "kind", "heads or channels", "of a sequence"),
            [
                (s["name"], s["kind"], s.get("value_heads", s.get("channels")), human_bytes(s["bytes"]))
                for s in facts["states"]
            ],
        )
    click.echo("\nexperts")
    print_table(
        ("layer", "module", "experts", "top-k", "body", "size"),
        [
            (i, layer["module"], layer["experts"], layer["top_k"], layer["body"], human_bytes(layer["bytes"]))
            for i, layer in enumerate(facts["experts"])
        ],
    )
    for body in facts["bodies"]:
        click.echo(
            f"{body['name']}: {body['hidden']} -> {body['intermediate']} -> {body['hidden']}, "
            f"{human_bytes(body['expert_bytes'])} each in {body['format'] or body['dtype']}, "
            f"{render(body['activation'])}"
        )
    profile = facts["profile"]
    click.echo(f"\nschedules (routing {profile['provenance']}, {profile['tokens']} tokens)")
    print_table(
        ("machine", "GPU memory", "host memory", "slots", "host experts", "hit rate", "ms/token"),
        [_schedule_cells(schedule) for schedule in facts["schedules"]],
    )
    if facts["accuracy"]:
        click.echo("\naccuracy, teacher-forced")
        print_table(
            ("reference", "computed in", "target", "text", "tokens", "argmax", "KL", "KL 99 %", "perplexity"),
            [_accuracy_cells(comparison) for comparison in facts["accuracy"]],
        )


def _print_fit(fit: dict[str, Any]) -> None:
    """What ``--fit`` chose, one line for each unit."""
    if fit["measured"] == "divergence":
        loss = f"predicted divergence {fit['loss']:.2e} nats a token, from {fit['tokens']} calibration tokens"
    else:
        loss = f"errors of weights {fit['loss']:.2e}, not measured on tokens"
    time = fit["milliseconds_per_token"]
    speed = "" if time is None else f", {time:.2f} ms/token on {fit['machine']}"
    click.echo(
        f"\nchosen for {fit['target']}: {human_bytes(fit['resident_bytes'])} with all experts{speed}; {loss}"
    )
    print_table(
        ("weights", "role", "matrices", "format", "size", "loss"),
        [
            (
                unit["name"],
                unit["role"],
                len(unit["parameters"]),
                unit["format"],
                human_bytes(unit["size_bytes"]),
                f"{unit['loss']:.2e}",
            )
            for unit in fit["units"]
        ],
    )
    click.echo()


def _sizes(named: dict[str, int]) -> str:
    return ", ".join(f"{human_bytes(size)} {name}" for name, size in named.items())


def _sees(attention: dict[str, Any]) -> str:
    """Which positions a token attends to."""
    if attention["causal"]:
        return f"the last {attention['window']}" if attention["window"] else "all so far"
    return "another's source" if attention["cross"] else "its whole source"


def _cached(attention: dict[str, Any]) -> str:
    width = attention["key_dim"] + (0 if attention["latent"] else attention["value_dim"])
    return f"{attention['kv_heads'] * width} values a token" + (" (latent)" if attention["latent"] else "")


def _schedule_cells(schedule: dict[str, Any]) -> tuple[str, ...]:
    prediction = schedule["prediction"]
    return (
        schedule["machine"]["name"],
        human_bytes(schedule["budgets"]["device_memory_bytes"]),
        human_bytes(schedule["budgets"]["host_memory_bytes"]),
        str(sum(layer["slots"] for layer in schedule["layers"])),
        str(sum(layer["host_experts"] for layer in schedule["layers"])),
        f"{prediction['hit_rate']:.2f}",
        f"{prediction['milliseconds_per_token']:.2f}",
    )


def _accuracy_cells(comparison: dict[str, Any]) -> tuple[str, ...]:
    found = comparison["agreement"]
    return (
        comparison["reference"],
        comparison["reference_dtype"],
        comparison["target"],
        comparison["text"][:16],
        str(found["tokens"]),
        f"{found['argmax_agreement']:.2%}",
        f"{found['mean_kl']:.2e}",
        f"{found['kl_99']:.2e}",
        f"{found['perplexity']:.4f} ({found['reference_perplexity']:.4f})",
    )


def render(expression: Any) -> str:
    """An activation as a formula: ``["mul", ["silu", "gate"], "up"]`` as ``mul(silu(gate), up)``."""
    if isinstance(expression, (list, tuple)):
        operator, *operands = expression
        return f"{operator}({', '.join(render(operand) for operand in operands)})"
    return str(expression)
