"""Tables in Markdown, from measurements."""

from measurements import Spread, apart, best_rates, finals, select, values_of

NAMES = {
    "transformer": "Transformer",
    "differential": "Differential",
    "v2": "DIFF V2",
    "grouped": "Grouped 4:1",
    "differential-raw": "λ one learned number",
    "differential-fixed": "λ fixed at λ_init",
    "differential-init-0.5": "λ_init 0.5",
    "differential-init-0.8": "λ_init 0.8",
    "differential-no-norm": "no head norm",
    "differential-no-scale": "no factor 1 − λ_init",
    "differential-no-norm-no-scale": "neither norm nor factor",
    "transformer-norm": "Transformer with the head norm",
    "transformer-wide": "Transformer, half the heads, twice as wide",
    "transformer-sign": "Transformer with a learned sign a head",
    "transformer-wide-value": "Transformer, half the heads, V twice as wide",
    "transformer-wide-sign-norm": "Transformer, half the heads, wide, with sign and norm",
}


def name_of(model):
    return NAMES.get(model, model)


def markdown(header, lines):
    """A table of these cells, the first column to the left."""
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)] + lines
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def models_of(rows):
    """The models of some rows: first the four that most questions compare."""
    known = [model for model in NAMES if select(rows, model=model)]
    return known + [model for model in values_of(rows, "model") if model not in NAMES]


def compared(rows, models=("transformer", "differential"), digits=3):
    """How the second of two models differs from the first: the text, and the sign, 0 where seeds overlap."""
    a, b = (Spread(select(rows, model=model)) for model in models)
    if not a or not b:
        return "–", None
    difference = f"{b.mean - a.mean:+.{digits}f}"
    if min(a.count, b.count) < 3:
        return f"{difference}, too few seeds", None
    if not apart(a, b):
        return f"{difference}, seeds overlap", 0
    return difference, 1 if b.mean > a.mean else -1


def by_model(rows, field, title, verdict, digits=3, label=str):
    """A line for each value of `field`, a column for each model, and what `verdict` says of the first two."""
    models = models_of(rows)
    both = {"transformer", "differential"} <= set(models)
    lines = []
    for value in values_of(rows, field):
        of_value = select(rows, **{field: value})
        line = [label(value)] + [Spread(select(of_value, model=model)).text(digits) for model in models]
        lines.append(line + ([verdict(of_value, digits)] if both else []))
    return markdown([title] + [name_of(model) for model in models] + (["Difference"] if both else []), lines)


def of_maps(rows, measurements, when, verdict):
    """A line for each layer and measurement (name: title) of whole maps, a column for each model."""
    lines = []
    for layer in values_of(rows, "layer"):
        for measurement, title in measurements.items():
            of_line = select(rows, map="combined", layer=layer, measurement=measurement)
            lines.append([f"layer {layer}: {title}"]
                         + [Spread(select(of_line, model=model)).text() for model in models_of(rows)] + [verdict(of_line)])
    return markdown([f"{when}, all of A"] + [name_of(model) for model in models_of(rows)] + ["Difference"], lines)


def parameters_of(rows):
    """The parameter counts of the models, and how far apart they are."""
    counts = {model: sorted({int(float(row["parameters"])) for row in select(rows, model=model)})
              for model in models_of(rows)}
    text = "; ".join(f"{name_of(model)} {', '.join(f'{count:,}' for count in counts[model])}" for model in counts)
    return f"Parameters: {text}."


def curve(rows, field):
    """Points (x, mean, least, most) over the values of a field."""
    points = []
    for value in values_of(rows, field):
        spread = Spread(select(rows, **{field: value}))
        points.append((float(value), spread.mean, spread.least, spread.most))
    return points


def at_best_rate(rows, made):
    """The rows of every model's better learning rate, by validation loss at the end, and a note that says which it was."""
    losses = select(rows, measurement="validation_loss")
    best = {row["model"]: row["learning_rate"] for row in best_rates(finals(losses), "model")}
    chosen = "; ".join(f"{name_of(model)} {best[model]}" for model in models_of(rows) if model in best)
    made.note(f"Learning rate, of {', '.join(values_of(rows, 'learning_rate'))} the one with the least validation loss: "
              f"{chosen}.")
    return [row for row in rows if row["learning_rate"] == best.get(row["model"])]
