"""The questions of docs/lab.md, in the order of the page: what of the CSVs is shown of each, and how."""

import language_questions
import pictures
import retrieval_questions
import tables
from measurements import select

# experiment: who makes its tables and picture, and what the picture shows.
QUESTIONS = {
    "needle": (retrieval_questions.needle, "Accuracy against the length of the context and the depth of the needle"),
    "attention": (retrieval_questions.attention, "Share of attention on the answer, by its depth"),
    "attention_on_text": (language_questions.attention_on_text, "Keys that the attention of language models is spread over"),
    "amplification": (retrieval_questions.amplification, "Answer against noise, and the size of head outputs, in training"),
    "scaling": (language_questions.scaling, "Validation loss against parameters, bytes read, FLOP and seconds"),
    "lambda": (retrieval_questions.lambdas, "λ of every layer through training"),
    "variants_on_text": (language_questions.variants_on_text, "Loss of language models whose attention lacks a part"),
    "two_heads": (retrieval_questions.two_heads, "Accuracy of Transformers with parts of the differential head"),
    "long_context": (language_questions.long_context, "Loss by position"),
    "order": (language_questions.order, "Accuracy by the number of examples in the context"),
    "outliers": (language_questions.outliers, "Loss with rounded attention scores"),
    "cost": (language_questions.cost, "Time of the Differential Transformer over that of the Transformer"),
}

BLOCKS = [name + part for name in QUESTIONS for part in ("_table", "_picture")]


class Made:
    """What one question makes."""

    def __init__(self):
        self.tables, self.notes, self.script = [], [], None
        self.signs = []  # of the differences between Transformer and Differential Transformer

    def table(self, text):
        self.tables.append(text)

    def note(self, text):
        """A sentence below the tables."""
        self.notes.append(text)

    def verdict(self, rows, digits=3):
        """What the seeds of Transformer and Differential Transformer say of each other; it is counted."""
        text, sign = tables.compared(rows, digits=digits)
        if sign is not None:
            self.signs.append(sign)
        return text

    def text(self):
        notes = list(self.notes)
        if self.signs:
            lower, higher = self.signs.count(-1), self.signs.count(1)
            notes.append(f"**Of {len(self.signs)} comparisons the seeds are apart in {lower + higher}: the Differential "
                         f"Transformer's figure is lower in {lower} and higher in {higher}.**")
        return "\n".join(self.tables + [" ".join(notes) + "\n"] if notes else self.tables)

    def picture(self, panels):
        """Of the panels that have something to show."""
        shown = [panel for panel in panels if panel.series]
        if shown:
            self.script = pictures.script_of(shown)


def make(rows):
    """Two dictionaries by name: the text of tables, and the scripts of pictures, of all questions that have data.

    Raises ValueError for an experiment that is no question here."""
    unknown = sorted({row["experiment"] for row in rows} - set(QUESTIONS))
    if unknown:
        raise ValueError(f"no question is called {unknown[0]}: questions.py knows {', '.join(QUESTIONS)}")
    tables, scripts = {}, {}
    for name, (fill, _) in QUESTIONS.items():
        of_question = select(rows, experiment=name)
        if not of_question:
            continue
        made = Made()
        fill(of_question, made)
        tables[name + "_table"] = made.text()
        if made.script:
            scripts[name] = made.script
    return tables, scripts
