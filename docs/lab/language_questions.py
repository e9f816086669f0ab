"""Tables and pictures of the questions that are asked of language models, and of the one about order in context."""

from measurements import Spread, best_rates, finals, mean_of, select, values_of
from pictures import COLOURS, Panel, Series
from tables import at_best_rate, by_model, compared, curve, markdown, models_of, name_of, of_maps, parameters_of


def size_of(row):
    return f"{row['layers']} × {row['width']}"


def sizes_of(rows):
    """The sizes of some rows, the smallest first, each with its rows."""
    sizes = {}
    for row in sorted(rows, key=lambda row: row.number("parameters")):
        sizes.setdefault(size_of(row), []).append(row)
    return sizes


def scaling(rows, made):
    losses = select(rows, measurement="validation_loss")
    last = finals(losses)
    models = models_of(last)
    lines = []
    for size, of_size in sizes_of(last).items():
        for rate in values_of(of_size, "learning_rate"):
            of_rate = select(of_size, learning_rate=rate)
            each = [select(of_rate, model=model) for model in models]
            flop = dict.fromkeys(f"{mean_of(one, 'flop'):.2g}" for one in each if one)  # mostly the same for all
            lines.append([size, f"{mean_of(of_rate, 'tokens'):,.0f}", " / ".join(flop),
                          " / ".join(f"{mean_of(one, 'seconds'):.1f}" if one else "–" for one in each), rate]
                         + [Spread(one).text() for one in each] + [made.verdict(of_rate)])
    made.table(markdown(["Layers × width", "Bytes read", "FLOP", "Seconds of each", "Learning rate"]
                        + [name_of(model) for model in models] + ["Difference"], lines))
    made.note(parameters_of(last))
    best = best_rates(last, "model", "width", "layers")
    others = [model for model in models if model != "transformer"]
    lines = []
    for size, of_size in sizes_of(best).items():
        each = [select(of_size, model=model) for model in models]
        lines.append([size] + [f"{Spread(one).text()} at {one[0]['learning_rate']}" if one else "–" for one in each]
                     + [compared(of_size, ("transformer", model))[0] for model in others])
    made.table(markdown(["At the best rate of each"] + [name_of(model) for model in models]
                        + [f"{name_of(model)} less Transformer" for model in others], lines))
    stability = [["Largest gradient norm behind the warm-up", "largest_gradient_norm", 2],
                 ["Largest rise of the training loss above its least", "largest_rise", 3]]
    lines = []
    for title, measurement, digits in stability:
        for rate in values_of(rows, "learning_rate"):
            of_rate = select(rows, measurement=measurement, learning_rate=rate)
            for size, of_size in sizes_of(of_rate).items():
                lines.append([title, size, rate]
                             + [Spread(select(of_size, model=model)).text(digits) for model in models]
                             + [made.verdict(of_size, digits)])
    if lines:
        made.table(markdown(["Stability", "Layers × width", "Learning rate"] + [name_of(model) for model in models]
                            + ["Difference"], lines))

    chosen = {(row["model"], size_of(row)): row["learning_rate"] for row in best}
    made.picture([scaling_panel(axis, title, losses, best, chosen) for axis, title in
                  (("parameters", "parameters"), ("tokens", "bytes read"), ("flop", "FLOP"),
                   ("seconds", "seconds of one core"))])


def scaling_panel(axis, title, losses, best, chosen):
    """Final losses by size; over everything that grows in training, the way there of every size, too."""
    series = []
    for model, colour in zip(models_of(best), COLOURS):
        points = []
        for of_size in sizes_of(select(best, model=model)).values():
            spread = Spread(of_size)
            points.append((mean_of(of_size, axis), spread.mean, spread.least, spread.most))
        series.append(Series(name_of(model) + (", at the end" if axis != "parameters" else ""), points, colour))
        if axis == "parameters":
            continue
        for size, of_size in sizes_of(select(losses, model=model)).items():
            run = select(of_size, learning_rate=chosen.get((model, size), ""))
            way = []
            for step in values_of(run, "step"):
                of_step = select(run, step=step)
                spread = Spread(of_step)
                way.append((mean_of(of_step, axis), spread.mean, spread.mean, spread.mean))
            series.append(Series("", way, colour, dashed=True))
    return Panel(f"Validation loss by {title}", title, "nats a byte", series, log=("x",))


ON_TEXT = {"share_of_self": "share of the byte itself", "share_of_neighbours": "share of the four before it",
           "share_of_first": "share of the first byte", "entropy": "entropy, nats",
           "effective_support": "keys it is spread over"}


def attention_on_text(rows, made):
    rows = at_best_rate(rows, made)
    for when, chosen in (("Before training", select(rows, step="0")), ("After training", finals(rows))):
        made.table(of_maps(chosen, ON_TEXT, when, made.verdict))
    made.note(parameters_of(rows))
    support = select(finals(rows), measurement="effective_support")
    series = []
    for model, of_map, title in (("transformer", "combined", "Transformer"), ("differential", "p1", "Differential, P₁"),
                                 ("differential", "p2", "Differential, P₂"),
                                 ("differential", "combined", "Differential, A")):
        points = curve(select(support, model=model, map=of_map), "layer")
        series.append(Series(title, points, COLOURS[len(series)], dashed=of_map in ("p1", "p2")))
    made.picture([Panel("Keys that attention is spread over, after training", "layer", "exp of the entropy", series)])


def variants_on_text(rows, made):
    rows = at_best_rate(rows, made)
    last = finals(rows)
    lines = []
    for model in models_of(last):
        losses = select(last, measurement="validation_loss", model=("differential", model))
        zero = Spread(select(last, measurement="loss_lambda_0", model=model))
        of_lambda = select(rows, measurement="lambda", model=model)
        lambdas = [f"{Spread(select(finals(of_lambda), layer=layer)).mean:.2f}" for layer in values_of(of_lambda, "layer")]
        least = f"{min(row['value'] for row in of_lambda):.2f}" if of_lambda else "–"
        lines.append([name_of(model), Spread(select(losses, model=model)).text(),
                      "" if model == "differential" else compared(losses, ("differential", model))[0], zero.text(),
                      ", ".join(lambdas) or "–", least])
    made.table(markdown(["Model", "Validation loss, nats a byte", "less the Differential's", "with λ forced to 0",
                         "λ of the layers at the end", "Least ever seen"], lines))
    made.note(parameters_of(last))
    losses = select(last, measurement="validation_loss")
    spreads = {name_of(model): Spread(select(losses, model=model)) for model in models_of(losses)}
    names = sorted(spreads, key=lambda name: spreads[name].mean)
    points = [(row, spreads[name].mean, spreads[name].least, spreads[name].most) for row, name in enumerate(names)]
    made.picture([Panel("Loss of the variants on text", "nats a byte", "", [Series("mean and range of the seeds", points)],
                        names=names)])


def long_context(rows, made):
    rows = at_best_rate(rows, made)
    losses = select(rows, measurement="loss")
    trained = values_of(losses, "length")
    made.table(by_model(losses, "position", "Positions up to", made.verdict))
    made.note(parameters_of(losses))
    series = [Series(name_of(model), curve(select(losses, model=model), "position"), COLOURS[index])
              for index, model in enumerate(models_of(losses))]
    made.picture([Panel(f"Loss by position, trained on sequences of {', '.join(trained)} bytes", "position",
                        "nats a byte", series, log=("x",))])


def order(rows, made):
    rows = at_best_rate(rows, made)
    lines = []
    labels = {"random": "in random order", "by_label": "label after label"}
    measurements = {"order_mean": "mean of the orders", "order_best": "best order", "order_worst": "worst order",
                    "order_margin": "best − worst"}
    for arrangement, arranged in labels.items():
        for measurement, title in measurements.items():
            of_both = select(rows, measurement=measurement, arrangement=arrangement)
            if of_both:
                lines.append([f"{title}, {arranged}"]
                             + [Spread(select(of_both, model=model)).text() for model in ("transformer", "differential")]
                             + [made.verdict(of_both)])
    made.table(markdown(["Accuracy", "Transformer", "Differential", "Difference"], lines))
    by_shots = select(rows, measurement="accuracy")
    made.table(by_model(by_shots, "shots", "Examples seen", made.verdict))
    made.note(parameters_of(rows))
    series = [Series(name_of(model), curve(select(by_shots, model=model), "shots"), COLOURS[index])
              for index, model in enumerate(models_of(by_shots))]
    chance = [(1 / float(value), "chance") for value in values_of(rows, "labels")]
    made.picture([Panel("Accuracy by the examples seen before", "examples", "accuracy", series, y_range=(0, 1),
                        levels=chance)])


def outliers(rows, made):
    rows = at_best_rate(rows, made)
    lines = []
    for measurement, title in (("score", "Attention scores"), ("hidden", "Hidden values")):
        of_kind = select(rows, measurement=measurement)
        for rank in values_of(of_kind, "rank"):
            of_rank = select(of_kind, rank=rank)
            lines.append([title, rank if rank == "median" else f"top {rank}"]
                         + [Spread(select(of_rank, model=model)).text(2) for model in ("transformer", "differential")]
                         + [made.verdict(of_rank, 2)])
    if lines:
        made.table(markdown(["Size of", "Rank", "Transformer", "Differential", "Difference"], lines))
    rounded = select(rows, measurement="rounded_loss")
    bits = {"0": "32 (not rounded)"}
    made.table(by_model(select(rows, measurement="rounded_accuracy"), "bits", "Accuracy, scores of bits",
                        made.verdict, label=lambda text: bits.get(text, text)))
    made.table(by_model(rounded, "bits", "Loss, scores of bits", made.verdict,
                        label=lambda text: bits.get(text, text)))
    made.note(parameters_of(rows))
    series = []
    for index, model in enumerate(models_of(rounded)):
        points = curve(select(rounded, model=model), "bits")
        series.append(Series(name_of(model), [point for point in points if point[0] != 0], COLOURS[index]))
        exact = [point for point in points if point[0] == 0]
        if exact and points[-1][0] != 0:
            level = exact[0][1]
            series.append(Series(f"{name_of(model)}, not rounded", [(x, level, level, level) for x in (4, 8)],
                                 COLOURS[index], dashed=True))
    made.picture([Panel("Loss with rounded attention scores", "bits of a score", "nats a byte", series)])


def cost(rows, made):
    titles = {"forward": "forward", "forward_backward": "forward and backward", "step": "training step",
              "decode": "decode"}
    lines, series = [], []
    for index, (measurement, title) in enumerate(titles.items()):
        ratios = []
        for size, of_size in sizes_of(select(rows, measurement=measurement)).items():
            both = [Spread(select(of_size, model=model)) for model in ("transformer", "differential")]
            if not all(both):
                continue
            ratio = [d["value"] / t["value"] for t in select(of_size, model="transformer")
                     for d in select(of_size, model="differential", seed=t["seed"])]
            spread = Spread([{"value": value} for value in ratio])
            ratios.append((mean_of(of_size, "parameters"), spread.mean, spread.least, spread.most))
            lines.append([title, size] + [one.text(2) for one in both] + [spread.text(2)])
        series.append(Series(title, ratios, COLOURS[index]))
    made.table(markdown(["Microseconds a byte", "Layers × width", "Transformer", "Differential",
                         "Differential / Transformer"], lines))
    made.picture([Panel("Time of the Differential Transformer", "parameters", "times the Transformer's", series,
                        log=("x",), levels=((1, "as fast"),))])
