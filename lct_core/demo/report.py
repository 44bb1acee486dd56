"""What a person reads at the end of a run: the table, and which goals were met."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LABELS = {
    "data": "the data",
    "independent": "independent",
    "joint": "joint",
    "conditional": "conditional",
    "ar_bidirectional": "AR, bidirectional",
    "ar_causal_before": "AR, causal, before",
    "ar_causal": "AR, causal, KV cache",
}
FILES = (
    "contact_sheet.png",
    "scenes.mp4",
    "modes.png",
    "losses.png",
    "accumulation.png",
    "long_scene.png",
    "composition.png",
    "metrics.json",
)
GOALS = {"joint": 5.0, "conditional": 3.0, "ar_bidirectional": 3.0}  # times below independent
_ADHERENCE, _CAUSAL, _SINGLE_SHOT = 0.9, 1.25, 1.05
_TUNED = ("joint", "conditional", "ar_bidirectional", "ar_causal")


def key(mode: str, measure: str) -> str:
    """What ``metrics.json`` calls a measure of a mode; what was measured before a tuning ends in ``_before``."""
    return f"{mode.removesuffix('_before')}_{measure}{'_before' if mode.endswith('_before') else ''}"


def report(metrics: dict[str, Any], out: Path, console: Console) -> None:
    """Print the table, the verdicts and where everything is."""
    table = Table(title=f"Appearance error, {metrics['held_out']} held-out scenes of {metrics['shots']} shots")
    table.caption = "conditional: shot 1 is given; before: context-causal tuning; less by: than independent"
    table.add_column("", no_wrap=True)
    for column in ("error", "character", "background", "less by", "adherence"):
        table.add_column(column, justify="right")
    for mode, label in LABELS.items():
        error, baseline = metrics[key(mode, "error")], metrics["independent_error"]
        table.add_row(
            label,
            f"{error:.3f}",
            f"{metrics[key(mode, 'error_character')]:.3f}",
            f"{metrics[key(mode, 'error_background')]:.3f}",
            "" if mode == "data" else f"{baseline / error:.1f} x" if error else "-",
            f"{metrics[key(mode, 'adherence')]:.3f}",
        )
    console.print(table)
    for what, value, goal, met in verdicts(metrics):
        console.print(f"{'met    ' if met else 'NOT MET'}  {what}: {value:.3g}, goal {goal}", soft_wrap=True)
    console.print(
        f"{metrics['parameters']:,} parameters, {metrics['parameters_added']} added; {metrics['euler_steps']} Euler "
        f"steps, guidance {metrics['guidance']:g} in every mode, t_c {metrics['t_c']:g}; seed {metrics['seed']}; "
        f"{metrics['seconds']:.0f} s",
        soft_wrap=True,
    )
    if "composed_character" in metrics:
        parts = (
            f"{part} {metrics[f'composed_{part}']:.3f}, without the images {metrics[f'without_images_{part}']:.3f}"
            for part in ("character", "background")
        )
        console.print(f"composition, distance from the images' colours: {'; '.join(parts)}", soft_wrap=True)
    for name in FILES:
        if (out / name).exists():
            console.print(str(out / name), soft_wrap=True, markup=False)


def verdicts(metrics: dict[str, Any]) -> Iterator[tuple[str, float, str, bool]]:
    """Every goal: what, its value, the bound in words, and whether it is met; 0 / 0 meets none."""

    def over(a: str, b: str) -> float:
        return metrics[a] / metrics[b] if metrics[b] else float("inf" if metrics[a] else "nan")

    for mode, times in GOALS.items():
        below = over("independent_error", f"{mode}_error")
        yield f"{LABELS[mode]}: appearance error, times below independent", below, f">= {times:g}", below >= times
    ratio = over("ar_causal_error", "ar_bidirectional_error")
    yield "AR causal over AR bidirectional", ratio, f"<= {_CAUSAL:g}", ratio <= _CAUSAL
    ratio = over("ar_causal_error", "ar_causal_error_before")
    yield "AR causal over the same before its tuning", ratio, "< 1", ratio < 1
    for mode in _TUNED:
        share = over(f"{mode}_adherence", "independent_adherence")
        yield f"{LABELS[mode]}: adherence, share of independent's", share, f">= {_ADHERENCE:g}", share >= _ADHERENCE
    ratio = over("single_shot_loss_after", "single_shot_loss_before")
    yield "single-shot loss after tuning over before", ratio, f"<= {_SINGLE_SHOT:g}", ratio <= _SINGLE_SHOT
    added = metrics["parameters_added"]
    yield "parameters added", added, "0", added == 0
