"""Draws the benchmark's result as one SVG: a panel a figure, a bar a system; follows light and dark."""

from html import escape

PANELS = [  # title, figure, format
    ("CPU a token, 400 tokens at 33 a second (µs)", "cpu_400_33", "{:.0f}"),
    ("CPU a token, 400 tokens at 300 a second (µs)", "cpu_400_300", "{:.0f}"),
    ("400 streams at one instant, times the provider's 3.0 s, p99", "stretch_instant_p99", "{:.2f}"),
    ("memory a stream (KiB)", "memory", "{:.0f}"),
]
SYSTEMS = ("awschat", "LangGraph peer", "peer without database", "nginx")
WIDTH, LABEL, BAR, STEP, GAP = 760, 160, 16, 24, 52
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .title { font-weight: 600 }
    .note { font-size: 11px; fill: #59636e }
    .bar { fill: #afb8c1 }
    .ours { fill: #d9730d }
    @media (prefers-color-scheme: dark) {
        text { fill: #e6edf3 }
        .note { fill: #9198a1 }
        .bar { fill: #57606a }
        .ours { fill: #f0883e }
    }
"""


def panel(title, key, form, figures, top):
    """One figure's bars, to a scale of their own, from `top` down -> lines of SVG."""
    values = {name: figures[name][key] for name in SYSTEMS if key in figures.get(name, {})}
    scale = (WIDTH - LABEL - 70) / max(*values.values(), 1e-9)
    yield f'<text class="title" x="0" y="{top}">{escape(title)}</text>'
    for row, (name, value) in enumerate(values.items()):
        y, length = top + 10 + row * STEP, max(1.5, value * scale)
        kind = "bar ours" if name == "awschat" else "bar"
        yield f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>'
        yield f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>'
        yield f'<text x="{LABEL + length + 6:.1f}" y="{y + 13}">{form.format(value)}</text>'


def svg(figures, when):
    """The whole picture; `figures` is {system: {figure: number}}."""
    height = len(SYSTEMS) * STEP + GAP
    shown = [entry for entry in PANELS if any(entry[1] in figures.get(name, {}) for name in SYSTEMS)]
    box = f"-10 0 {WIDTH + 20} {len(shown) * height + 10}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img">',
        "<title>awschat beside a LangGraph backend and nginx</title>",
        f"<style>{STYLE}</style>",
    ]
    for number, entry in enumerate(shown):
        lines += panel(*entry, figures, number * height + 24)
    note = f"Persistence, guard, log and metrics on, but where it says so; shorter is better; {when}"
    lines.append(f'<text class="note" x="0" y="{len(shown) * height}">{escape(note)}</text>')
    return "\n".join([*lines, "</svg>", ""])
