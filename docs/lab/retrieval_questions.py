"""Tables and pictures of the questions that are asked of models which search for needles."""

from measurements import Spread, finals, select, values_of
from pictures import COLOURS, Panel, Series
from tables import at_best_rate, by_model, compared, curve, markdown, models_of, name_of, of_maps, parameters_of


def chance_of(rows):
    return [(float(value), "chance") for value in values_of(rows, "chance")]


def longest(rows):
    """The rows of the longest context."""
    contexts = values_of(rows, "context")
    return select(rows, context=contexts[-1]) if contexts else []


def lines_of(rows, field, colours=COLOURS):
    """A line for every model over the values of a field."""
    return [Series(name_of(model), curve(select(rows, model=model), field), colours[index % len(colours)])
            for index, model in enumerate(models_of(rows))]


def needle(rows, made):
    rows = at_best_rate(rows, made)
    last = finals(rows)
    accuracy = select(last, measurement="accuracy")
    by_depth = longest(select(last, measurement="accuracy_by_depth"))
    made.table(by_model(accuracy, "context", "Accuracy, context of", made.verdict))
    made.table(by_model(by_depth, "depth", "Longest context, depth", made.verdict))
    made.note(f"Chance {', '.join(values_of(rows, 'chance'))}.")
    made.note(parameters_of(rows))
    contexts = ", ".join(values_of(by_depth, "context"))
    made.picture([
        Panel("Accuracy by context", "tokens", "accuracy", lines_of(accuracy, "context"), log=("x",),
              y_range=(0, 1.02), levels=chance_of(rows)),
        Panel(f"Accuracy by depth, context of {contexts}", "depth of the needle, 0 first", "accuracy",
              lines_of(by_depth, "depth"), y_range=(0, 1.02), levels=chance_of(rows))])


ATTENTION = {"share_of_answer": "share of the answer", "share_of_other_needles": "share of other needles",
             "share_of_rest": "share of the rest", "entropy": "entropy, nats", "effective_support": "keys it is spread over"}


def attention(rows, made):
    rows = at_best_rate(rows, made)
    long = longest(rows)
    for when, chosen in (("Before training", select(long, step="0")), ("After training", finals(long))):
        made.table(of_maps(chosen, ATTENTION, when, made.verdict))
    lines = []
    of_differential = select(finals(long), model="differential")
    for layer in values_of(of_differential, "layer"):
        for of_map, title in (("p1", "P₁"), ("p2", "P₂"), ("combined", "A = P₁ − λP₂")):
            of_line = select(of_differential, layer=layer, map=of_map)
            lines.append([f"layer {layer}: {title}"]
                         + [Spread(select(of_line, measurement=measurement)).text() for measurement in ATTENTION])
    if lines:
        made.table(markdown(["Differential, after training"] + list(ATTENTION.values()), lines))
    made.note(f"Context of {', '.join(values_of(long, 'context'))} tokens; of a map with signs, shares are those of "
              "|A| / Σ|A|.")
    made.note(parameters_of(rows))
    depths = select(finals(long), measurement="share_of_answer_by_depth", map="combined")
    made.picture([Panel(f"Share of the answer, layer {layer}", "depth of the needle, 0 first", "share of attention",
                        lines_of(select(depths, layer=layer), "depth")) for layer in values_of(depths, "layer")])


AMPLIFICATION = {"row_sum": "sum of a row of A", "negative_mass": "negative part of |A|",
                 "answer_to_noise_p1": "answer / noise in P₁", "answer_to_noise_map": "answer / noise in A",
                 "head_rms_before_norm": "head output (RMS) before its norm",
                 "head_rms_after_norm": "head output (RMS) behind norm and factor"}


def amplification(rows, made):
    rows = at_best_rate(rows, made)
    last = finals(rows)
    models = models_of(last)
    lines = []
    for layer in values_of(last, "layer"):
        for measurement, title in AMPLIFICATION.items():
            of_line = select(last, layer=layer, measurement=measurement)
            lines.append([f"layer {layer}: {title}"]
                         + [Spread(select(of_line, model=model)).text(2) for model in models]
                         + [made.verdict(of_line, 2)])
    made.table(markdown(["After training"] + [name_of(model) for model in models] + ["Difference"], lines))
    made.note(parameters_of(rows))
    of_differential = select(rows, model="differential")
    panels = []
    for title, y, measurements in (("Answer against noise, Differential", "weight of the answer / of one noise key",
                                    ("answer_to_noise_p1", "answer_to_noise_map")),
                                   ("Head outputs, Differential", "RMS",
                                    ("head_rms_before_norm", "head_rms_after_norm"))):
        series = []
        for index, layer in enumerate(values_of(of_differential, "layer")):
            for place, measurement in enumerate(measurements):
                of_line = select(of_differential, layer=layer, measurement=measurement)
                series.append(Series(f"layer {layer}: {AMPLIFICATION[measurement]}", curve(of_line, "step"),
                                     COLOURS[index], dashed=place == 0))
        panels.append(Panel(title, "step", y, series))
    made.picture(panels)


def lambdas(rows, made):
    rows = at_best_rate(rows, made)
    last = finals(rows)
    of_lambda = select(rows, measurement="lambda")
    lines = []
    for model in models_of(of_lambda):
        of_model = select(of_lambda, model=model)
        for layer in values_of(of_model, "layer"):
            of_layer = select(of_model, layer=layer)
            spread = Spread(finals(of_layer))
            lines.append([f"{name_of(model)}, layer {layer}", Spread(select(of_layer, step="0")).text(), spread.text(),
                          f"{min(row['value'] for row in of_layer):.3f}"])
    made.table(markdown(["λ", "Before training", "After training", "Least ever seen"], lines))
    variants = [model for model in models_of(last) if model != "transformer"]
    lines = []
    for model in ["transformer"] + variants:
        of_model = longest(select(last, model=model, measurement="accuracy"))
        zero = longest(select(last, model=model, measurement="accuracy_lambda_0"))
        loss = select(last, model=model, measurement="validation_loss")
        against = [row for row in select(last, measurement="validation_loss")
                   if row["model"] in (model, "differential")]
        lines.append([name_of(model), Spread(of_model).text(), Spread(zero).text(), Spread(loss).text(),
                      "" if model == "differential" else compared(against, ("differential", model))[0]])
    made.table(markdown(["Variant", "Accuracy, longest context", "with λ forced to 0", "Validation loss",
                         "less the Differential's"], lines))
    made.note(parameters_of(last))
    panels = []
    for model in models_of(of_lambda):
        of_model = select(of_lambda, model=model)
        if model in ("differential", "v2", "differential-raw"):
            panels.append(Panel(f"λ through training: {name_of(model)}", "step", "λ",
                                [Series(f"layer {layer}", curve(select(of_model, layer=layer), "step"), COLOURS[index])
                                 for index, layer in enumerate(values_of(of_model, "layer"))]))
    made.picture(panels)


def two_heads(rows, made):
    rows = at_best_rate(rows, made)
    last = finals(rows)
    lines = []
    contexts = values_of(select(last, measurement="accuracy"), "context")
    for model in models_of(last):
        loss = select(last, measurement="validation_loss", model=("differential", model))
        lines.append([name_of(model)]
                     + [Spread(select(last, measurement="accuracy", context=context, model=model)).text()
                        for context in contexts]
                     + [Spread(select(loss, model=model)).text(),
                        "" if model == "differential" else compared(loss, ("differential", model))[0]])
    made.table(markdown(["Model"] + [f"Accuracy, context of {context}" for context in contexts]
                        + ["Validation loss", "less the Differential's"], lines))
    made.note(parameters_of(last))
    made.picture([Panel("Accuracy by context", "tokens", "accuracy",
                        lines_of(select(last, measurement="accuracy"), "context"), log=("x",), y_range=(0, 1.02),
                        levels=chance_of(rows))])
