"""Every data set's converter, on rows in the schema that it has on the Hub."""

import datasets
import pytest
from datasets import ClassLabel, Features, Value
from datasets import List as ListOf

from gisp_hf.data.records import Candidate
from gisp_hf.data.sources import SOURCES, choose_objective, find_sources

TEXT, WHOLE = Value("string"), Value("int32")
CHOICES = {"text": ListOf(TEXT), "label": ListOf(TEXT)}
ARC = {"id": TEXT, "question": TEXT, "choices": CHOICES, "answerKey": TEXT}

# Columns and types as the Hub has them: (features, one row, the record that the row means).
HUB = {
    "c4": ({"text": TEXT, "timestamp": TEXT, "url": TEXT}, {"text": "w3 w4", "timestamp": "t", "url": "u"}, "w3 w4"),
    "wikitext2": ({"text": TEXT}, {"text": " = Heading = \n"}, " = Heading = \n"),
    "boolq": (
        {"question": TEXT, "answer": Value("bool"), "passage": TEXT},
        {"question": "is the sky blue", "answer": True, "passage": "It is."},
        ("It is.\nQuestion: is the sky blue?\nAnswer:", [" no", " yes"], 1),
    ),
    "piqa": (
        {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ClassLabel(names=["0", "1"])},
        {"goal": "To boil water,", "sol1": "heat it.", "sol2": "cool it.", "label": 0},
        ("Question: To boil water,\nAnswer:", [" heat it.", " cool it."], 0),
    ),
    "hellaswag": (
        {
            "ind": WHOLE,
            "activity_label": TEXT,
            "ctx_a": TEXT,
            "ctx_b": TEXT,
            "ctx": TEXT,
            "endings": ListOf(TEXT),
            "source_id": TEXT,
            "split": TEXT,
            "split_type": TEXT,
            "label": TEXT,
        },
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix. ",
            "ctx_b": "she",
            "ctx": "",
            "endings": ["eats.", "runs [step] off.", "[substeps] mixes  it.", "sings."],
            "source_id": "wikihow~4",
            "split": "train",
            "split_type": "indomain",
            "label": "2",
        },
        ("Baking: How to bake. Mix. She", [" eats.", " runs off.", " mixes it.", " sings."], 2),
    ),
    "winogrande": (
        {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
        {"sentence": "Ann thanked Bea as _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        None,  # the prompts differ: test_winogrande
    ),
    "arc_easy": (
        ARC,
        {"id": "a", "question": "Hot?", "choices": {"text": ["sun", "ice"], "label": ["1", "2"]}, "answerKey": "1"},
        ("Question: Hot?\nAnswer:", [" sun", " ice"], 0),
    ),
    "arc_challenge": (
        ARC,
        {
            "id": "b",
            "question": "Cold?",
            "choices": {"text": ["sun", "fire", "ice"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
        ("Question: Cold?\nAnswer:", [" sun", " fire", " ice"], 2),
    ),
    "openbookqa": (
        {"id": TEXT, "question_stem": TEXT, "choices": CHOICES, "answerKey": TEXT},
        {
            "id": "7-980",
            "question_stem": "The sun is",
            "choices": {"text": ["cold", "hot", "wet", "old"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        ("The sun is", [" cold", " hot", " wet", " old"], 1),
    ),
    "gsm8k": (
        {"question": TEXT, "answer": TEXT},
        {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        ("Question: Two and two?\nAnswer:", [" 2 + 2 = <<2+2=4>>4\n#### 4"], 0),
    ),
    "medqa": (
        {
            "question": TEXT,
            "answer": TEXT,
            "options": dict.fromkeys("ABCD", TEXT),
            "meta_info": TEXT,
            "answer_idx": TEXT,
            "metamap_phrases": ListOf(TEXT),
        },
        {
            "question": "Which drug?",
            "answer": "Two",
            "options": {"A": "One", "B": "Two", "C": "Three", "D": "Four"},
            "meta_info": "step1",
            "answer_idx": "B",
            "metamap_phrases": ["drug"],
        },
        ("Question: Which drug?\nA. One\nB. Two\nC. Three\nD. Four\nAnswer:", [" A", " B", " C", " D"], 1),
    ),
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_converter_reads_the_hub_schema(name):
    features, row, expected = HUB[name]
    stored = datasets.Dataset.from_list([row], features=Features(features))[0]
    record = SOURCES[name].read(stored)
    if isinstance(expected, str):
        assert record == expected
    elif expected:
        prompt, completions, gold = expected
        assert record == tuple(Candidate(prompt, text, at == gold) for at, text in enumerate(completions))


def test_winogrande_fills_the_blank_in_the_prompt():
    rest = " had helped."
    assert SOURCES["winogrande"].read(HUB["winogrande"][1]) == (
        Candidate("Ann thanked Bea as Ann", rest, False),
        Candidate("Ann thanked Bea as Bea", rest, True),
    )


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("c4", ["language_modeling"]),
        ("gsm8k", ["completion", "language_modeling"]),
        ("cmqa", ["margin", "completion", "language_modeling"]),
    ],
)
def test_objectives_that_a_data_set_has_the_labels_for(name, allowed):
    named = find_sources(name)
    assert choose_objective(name, named, None) == allowed[0]
    for objective in ("language_modeling", "completion", "margin"):
        if objective in allowed:
            assert choose_objective(name, named, objective) == objective
        else:
            with pytest.raises(ValueError, match=f"{name} cannot .* '{objective}': choose one of {', '.join(allowed)}"):
                choose_objective(name, named, objective)
