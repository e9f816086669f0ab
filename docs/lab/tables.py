"""Tables in Markdown, from measurements."""

from measurements import Spread, apart, select, values_of

NAMES = {"transformer": "Transformer", "differential": "Differential", "v2": "DIFF V2", "grouped": "Grouped 4:1"}


def name_of(model):
    return NAMES.get(model, model)


def markdown(header, lines):
    """A table of these cells, the first column to the left."""
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)] + lines
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def models_of(rows):
    """The models of some rows: first the four that most questions compare."""
    known = [model for model in NAMES if select(rows, model=model)]
    return known + [model for model in values_of(rows, "model") if model not in NAMES]


def verdict(rows, digits=3):
    """What the seeds of Transformer and Differential say of each other."""
    a, b = (Spread(select(rows, model=model)) for model in ("transformer", "differential"))
    if not a or not b:
        return "–"
    difference = f"{b.mean - a.mean:+.{digits}f}"
    return difference if apart(a, b) else f"{difference}, seeds overlap"


def by_model(rows, field, title, digits=3, label=str, difference=True):
    """A line for each value of `field`, a column for each model, and what lies between the first two."""
    models = models_of(rows)
    both = difference and {"transformer", "differential"} <= set(models)
    lines = []
    for value in values_of(rows, field):
        of_value = select(rows, **{field: value})
        line = [label(value)] + [Spread(select(of_value, model=model)).text(digits) for model in models]
        lines.append(line + ([verdict(of_value, digits)] if both else []))
    return markdown([title] + [name_of(model) for model in models] + (["Difference"] if both else []), lines)


def parameters_of(rows):
    """The parameter counts of the models, and how far apart they are."""
    counts = {model: sorted({int(float(row["parameters"])) for row in select(rows, model=model)})
              for model in models_of(rows)}
    text = "; ".join(f"{name_of(model)} {', '.join(f'{count:,}' for count in counts[model])}" for model in counts)
    return f"Parameters: {text}."
