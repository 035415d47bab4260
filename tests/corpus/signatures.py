"""Changes of signatures: every ordered pair of MLflow's types, and what people change by hand."""

import itertools
import math
from typing import Any

from tests.corpus.cases import (
    Case,
    array,
    breaks,
    column,
    gives,
    harmless,
    mapping,
    optional,
    param,
    record,
    takes,
    tensor,
    tuned,
)

TYPES = ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime", "any")
WIDER = {
    ("integer", "long"),
    ("integer", "double"),
    ("long", "double"),
    ("float", "double"),
    *((kind, "any") for kind in ("boolean", "integer", "long", "float", "double", "string")),
}
"""Columns: written down here by hand, and held against MLflow's own enforcement by a test."""
WIDER_INSIDE = {
    ("integer", "long"),
    ("float", "double"),
    *((kind, "any") for kind in TYPES if kind not in ("binary", "any")),
}
"""In arrays, where MLflow casts nothing and decodes nothing, but makes bytes of text in one of binary."""

PAIRS = [
    Case(
        f"a {old} column is {new} now", takes(column("c", old)), takes(column("c", new)), (old, new) not in WIDER, "'c'"
    )
    for old, new in itertools.permutations(TYPES, 2)
]
INSIDE = [
    Case(
        f"an array of {old} is one of {new} now",
        takes(column("c", array(old))),
        takes(column("c", array(new))),
        (old, new) not in WIDER_INSIDE,
        "'c[]'",
    )
    # Only where the rules inside are others than outside, or wider.
    for old, new in itertools.permutations(TYPES, 2)
    if ((old, new) in WIDER) != ((old, new) in WIDER_INSIDE) or (old, new) in WIDER_INSIDE
]

A, B, C = column("a"), column("b", "long"), column("c", "string")
TRIP = record(origin="string", legs=array(record(km="double", stops_="long")))


def trip(**change: Any) -> Any:
    legs = {"km": "double", "stops_": "long", **change}
    return takes(column("trip", record(origin="string", legs=array(record(**{k: v for k, v in legs.items() if v})))))


INPUTS = [
    # columns: added, removed, renamed, required
    breaks("a required column is new", takes(A), takes(A, B), "'b' (long) is new and required"),
    breaks("two required columns are new", takes(A), takes(A, B, C), "'b'"),
    breaks("a required column is new among many", takes(A, C), takes(A, column("wind", "float"), C), "'wind'"),
    breaks("a required column of a nested type is new", takes(A), takes(A, column("trip", TRIP)), "'trip'"),
    breaks("a required list is new", takes(A), takes(A, column("tags", array("string"))), "'tags'"),
    breaks("a column is renamed", takes(column("dep_delay"), B), takes(column("departure_delay"), B), "'dep_delay'"),
    breaks("a column is renamed by its case", takes(column("DepDelay")), takes(column("depdelay")), "'DepDelay'"),
    breaks("a column has a dash for an underscore", takes(column("dep_delay")), takes(column("dep-delay")), "'dep-delay'"),
    breaks("a column got a prefix", takes(column("delay"), B), takes(column("num__delay"), B), "'num__delay'"),
    breaks("a column has a trailing space", takes(column("fare")), takes(column("fare ")), "'fare '"),
    breaks(
        "an optional column is renamed by its case, and would be missed in silence",
        takes(A, optional("Wind")),
        takes(A, optional("wind")),
        "keep the name 'Wind'",
    ),
    breaks(
        "a required column is renamed by its separators and optional, and would be missed in silence",
        takes(A, column("wind_speed")),
        takes(A, optional("WindSpeed")),
        "'wind_speed'",
    ),
    breaks("all columns have other names", takes(A, B), takes(column("x0"), column("x1", "long")), "'x0'"),
    breaks("an optional column is required", takes(A, optional("b")), takes(A, column("b")), "'b' was optional"),
    breaks("an optional list is required", takes(optional("t", array("long"))), takes(column("t", array("long"))), "'t'"),
    breaks("an optional column is required and wider", takes(optional("b", "long")), takes(column("b", "double")), "'b'"),
    breaks("an optional column is narrower", takes(A, optional("b", "double")), takes(A, optional("b", "long")), "'b'"),
    breaks("one of many columns is narrower", takes(A, B, C), takes(A, column("b", "integer"), C), "'b'"),
    breaks("two columns have swapped their types", takes(A, C), takes(column("a", "string"), column("c")), "'a'"),
    # columns: layouts
    breaks("columns have lost their names", takes(A, B), takes(column(None), column(None, "long")), "without names"),
    breaks("columns have got names", takes(column(None), column(None, "long")), takes(A, B), "with names"),
    breaks("a frame has become a matrix", takes(A, column("b")), takes(tensor("float64", -1, 2)), "tensors"),
    breaks("a matrix has become a frame", takes(tensor("float64", -1, 2)), takes(A, column("b")), "columns with names"),
    breaks("a nameless column is new", takes(column(None)), takes(column(None), column(None, "long")), "column 1"),
    breaks(
        "nameless columns have changed places",
        takes(column(None), column(None, "string")),
        takes(column(None, "string"), column(None)),
        "'0'",
    ),
    breaks("a nameless column is narrower", takes(column(None, "double")), takes(column(None, "float")), "'0'"),
    # columns: nested
    breaks("a scalar has become a list", takes(column("c", "long")), takes(column("c", array("long"))), "'c'"),
    breaks("a list has become a scalar", takes(column("c", array("long"))), takes(column("c", "long")), "'c'"),
    breaks("a list has become a list of lists", takes(column("c", array("long"))), takes(column("c", array(array("long")))), "'c[]'"),
    breaks("a list of lists is narrower inside", takes(column("c", array(array("double")))), takes(column("c", array(array("float")))), "'c[][]'"),
    breaks("a list of anything is a list of text", takes(column("c", array("any"))), takes(column("c", array("string"))), "'c[]'"),
    breaks("a property is required that was not there", trip(), trip(gate="string"), "'trip.legs[].gate'"),
    breaks("an optional property is required", trip(), trip(stops_=None, stops="long"), "'trip.legs[].stops'"),
    breaks("a property is gone", trip(), trip(stops_=None), "'trip.legs[].stops' is gone"),
    breaks("a property is renamed", trip(), trip(km=None, kilometres="double"), "'trip.legs[].km'"),
    breaks("a property is narrower", trip(), trip(km="float"), "'trip.legs[].km'"),
    breaks("a property is another type", trip(), trip(km="string"), "'trip.legs[].km'"),
    breaks("a property is a list now", trip(), trip(km=array("double")), "'trip.legs[].km'"),
    breaks("a map is narrower", takes(column("m", mapping("double"))), takes(column("m", mapping("float"))), "'m{}'"),
    breaks("a map has become an object", takes(column("m", mapping("long"))), takes(column("m", record(x="long"))), "'m'"),
    breaks("an object with an optional property has become a map", takes(column("m", record(x="long", y_="long"))), takes(column("m", mapping("long"))), "'m.y'"),
    breaks("an object has become a map of another type", takes(column("m", record(x="long", y="string"))), takes(column("m", mapping("long"))), "'m.y'"),
    breaks("an object has become a list", takes(column("m", record(x="long"))), takes(column("m", array("long"))), "'m'"),
    breaks("an object has become text", takes(column("m", record(x="long"))), takes(column("m", "string")), "'m'"),
    # tensors
    breaks("a tensor is narrower", takes(tensor("float64", -1, 3)), takes(tensor("float32", -1, 3)), "tensor of float64"),
    breaks("a tensor of fractions is one of integers", takes(tensor("float32", -1, 3)), takes(tensor("int64", -1, 3)), "float32"),
    breaks("a tensor of numbers is one of text", takes(tensor("float64", -1, 3)), takes(tensor("str", -1, 3)), "float64"),
    breaks("a tensor of signed numbers is unsigned", takes(tensor("int8", -1, 3)), takes(tensor("uint8", -1, 3)), "int8"),
    breaks("a tensor of long integers is of 32 bits", takes(tensor("int64", -1, 3)), takes(tensor("int32", -1, 3)), "int64"),
    breaks("a tensor of booleans is one of numbers", takes(tensor("bool", -1, 3)), takes(tensor("int64", -1, 3)), "bool"),
    breaks("a tensor is wider by a feature", takes(tensor("float64", -1, 3)), takes(tensor("float64", -1, 4)), "(-1, 4)"),
    breaks("a tensor has lost a feature", takes(tensor("float64", -1, 3)), takes(tensor("float64", -1, 2)), "(-1, 2)"),
    breaks("pictures have another size", takes(tensor("uint8", -1, 28, 28)), takes(tensor("uint8", -1, 32, 32)), "28"),
    breaks("pictures have their channels first", takes(tensor("uint8", -1, 32, 32, 3)), takes(tensor("uint8", -1, 3, 32, 32)), "(-1, 3, 32, 32)"),
    breaks("a tensor has another rank", takes(tensor("float32", -1, 28, 28)), takes(tensor("float32", -1, 28, 28, 1)), "(-1, 28, 28, 1)"),
    breaks("a batch has a fixed size", takes(tensor("float32", -1, 3)), takes(tensor("float32", 16, 3)), "(16, 3)"),
    breaks("a free dimension is fixed", takes(tensor("float32", -1, -1)), takes(tensor("float32", -1, 128)), "(-1, 128)"),
    breaks("a tensor is renamed", takes(tensor("int64", -1, 8, name="input_ids")), takes(tensor("int64", -1, 8, name="inputIds")), "'input_ids'"),
    breaks("a tensor is new", takes(tensor("int64", -1, 8, name="ids")), takes(tensor("int64", -1, 8, name="ids"), tensor("int64", -1, 8, name="mask")), "'mask'"),
    breaks("a tensor has got a name", takes(tensor("float64", -1, 3)), takes(tensor("float64", -1, 3, name="x")), "tensors with names"),
    # harmless
    harmless("nothing has changed", takes(A, B, C), takes(A, B, C)),
    harmless("the columns are in another order", takes(A, B, C), takes(C, A, B)),
    harmless("an optional column is new", takes(A), takes(A, optional("b"))),
    harmless("an optional list is new", takes(A), takes(A, optional("tags", array("string"))), "instances"),
    harmless("an optional object is new", takes(A), takes(A, optional("trip", TRIP)), "instances"),
    harmless("an optional column that resembles a kept one is new", takes(column("temp")), takes(column("temp"), optional("temp_c"))),
    harmless("a column is no longer looked at", takes(A, B), takes(A)),
    harmless("an optional column is no longer looked at", takes(A, optional("b")), takes(A)),
    harmless("a nested column is no longer looked at", takes(A, column("trip", TRIP)), takes(A)),
    harmless("a column is replaced by an optional one of another name", takes(A, column("humid")), takes(A, optional("dew_point"))),
    harmless("a required column is optional", takes(A, B), takes(A, optional("b", "long"))),
    harmless("all columns are optional", takes(A, B), takes(optional("a"), optional("b", "long"))),
    harmless("a column is wider and optional", takes(A, B), takes(A, optional("b", "double"))),
    harmless("a required list is optional", takes(column("t", array("long"))), takes(optional("t", array("long")))),
    harmless("one column wider, one gone, one new and optional", takes(A, B, C), takes(A, column("b", "double"), optional("d"))),
    harmless("fewer nameless columns are looked at", takes(column(None), column(None, "long")), takes(column(None))),
    harmless("a nameless column is wider", takes(column(None, "float"), column(None, "long")), takes(column(None, "double"), column(None, "long"))),
    harmless("a list of lists is wider inside", takes(column("c", array(array("float")))), takes(column("c", array(array("double"))))),
    harmless("a list takes anything", takes(column("c", array(array("long")))), takes(column("c", array("any")))),
    harmless("a nested column takes anything", takes(column("c", TRIP)), takes(column("c", "any"))),
    harmless("an optional property is new", trip(), trip(gate_="string")),
    harmless("a required property is optional", trip(), trip(km=None, km_="double")),
    harmless("a property takes anything", trip(), trip(km="any")),
    harmless("the properties are in another order", takes(column("o", record(x="long", y="string"))), takes(column("o", record(y="string", x="long")))),
    harmless("a map is wider", takes(column("m", mapping("float"))), takes(column("m", mapping("double")))),
    harmless("a map takes anything", takes(column("m", mapping("long"))), takes(column("m", mapping("any")))),
    harmless("an object has become a map of its type", takes(column("m", record(x="long", y="long"))), takes(column("m", mapping("long")))),
    harmless("a Spark vector is an array of double", takes(column("v", "sparkml_vector")), takes(column("v", array("double")))),
    harmless("an array of double is a Spark vector", takes(column("v", array("double"))), takes(column("v", "sparkml_vector"))),
    harmless("a tensor is wider", takes(tensor("float32", -1, 3)), takes(tensor("float64", -1, 3))),
    harmless("a tensor of bytes is one of fractions", takes(tensor("uint8", -1, 4)), takes(tensor("float32", -1, 4))),
    harmless("a tensor of 32 bit integers is long", takes(tensor("int32", -1, 3)), takes(tensor("int64", -1, 3))),
    harmless("a fixed batch is free", takes(tensor("float32", 2, 3)), takes(tensor("float32", -1, 3))),
    harmless("pictures may have any size", takes(tensor("uint8", -1, 28, 28)), takes(tensor("uint8", -1, -1, -1))),
    harmless("a tensor of numbers takes any objects", takes(tensor("int64", -1)), takes(tensor("object", -1))),
    harmless("the tensors are in another order", takes(tensor("int64", -1, 8, name="ids"), tensor("int64", -1, 8, name="mask")), takes(tensor("int64", -1, 8, name="mask"), tensor("int64", -1, 8, name="ids"))),
    harmless("a tensor is no longer looked at", takes(tensor("int64", -1, 8, name="ids"), tensor("int64", -1, 8, name="mask")), takes(tensor("int64", -1, 8, name="ids"))),
]  # fmt: skip

SCORE, BAND = column("score"), column("band", "string")
OUTPUTS = [
    breaks("an output is gone", gives(SCORE, BAND), gives(SCORE), "output 'band' is gone"),
    breaks("an output is new", gives(SCORE), gives(SCORE, BAND), "output 'band' is new"),
    breaks("an output is renamed", gives(SCORE), gives(column("risk")), "output 'score' is gone"),
    breaks("a fraction is a whole number", gives(SCORE), gives(column("score", "long")), "double"),
    breaks("a whole number is a fraction", gives(column("n", "long")), gives(column("n", "double")), "long"),
    breaks("a number is text", gives(SCORE), gives(column("score", "string")), "string"),
    breaks("a label is a number", gives(BAND), gives(column("band", "long")), "string"),
    breaks("a flag is a number", gives(column("late", "boolean")), gives(column("late", "long")), "boolean"),
    breaks("a date is a number", gives(column("on", "datetime")), gives(column("on", "long")), "datetime"),
    breaks("an output may be missing", gives(SCORE, BAND), gives(SCORE, optional("band", "string")), "may be missing"),
    breaks("an output is a list", gives(SCORE), gives(column("score", array("double"))), "array of double"),
    breaks("a list is one number", gives(column("p", array("double"))), gives(column("p")), "array of double"),
    breaks("a list of numbers is one of text", gives(column("p", array("double"))), gives(column("p", array("string"))), "array of string"),
    breaks("an output may be anything", gives(SCORE), gives(column("score", "any")), "any"),
    breaks("an output property is gone", gives(column("o", record(x="long", y="long"))), gives(column("o", record(x="long"))), "output 'o'"),
    breaks("an output property may be missing", gives(column("o", record(x="long"))), gives(column("o", record(x_="long"))), "output 'o'"),
    breaks("an output object is a map", gives(column("o", record(x="long"))), gives(column("o", mapping("long"))), "map of long"),
    breaks("probabilities have become labels", gives(tensor("float64", -1, 2)), gives(tensor("int64", -1)), "(-1, 2)"),
    breaks("labels have become probabilities", gives(tensor("int64", -1)), gives(tensor("float64", -1, 2)), "(-1, 2)"),
    breaks("there is one class more", gives(tensor("float64", -1, 2)), gives(tensor("float64", -1, 3)), "(-1, 3)"),
    breaks("there is one class less", gives(tensor("float64", -1, 3)), gives(tensor("float64", -1, 2)), "(-1, 2)"),
    breaks("there is any number of classes", gives(tensor("float64", -1, 3)), gives(tensor("float64", -1, -1)), "(-1, -1)"),
    breaks("the label is text", gives(tensor("int64", -1)), gives(tensor("object", -1)), "object"),
    breaks("an embedding has another length", gives(tensor("float32", -1, 384)), gives(tensor("float32", -1, 768)), "768"),
    breaks("an array has become a frame", gives(tensor("float64", -1)), gives(column("prediction")), "columns with names"),
    breaks("a frame has become an array", gives(SCORE), gives(tensor("float64", -1)), "tensors without names"),
    breaks("an output tensor is renamed", gives(tensor("float32", -1, 2, name="logits")), gives(tensor("float32", -1, 2, name="probs")), "'logits' is gone"),
    harmless("the outputs are in another order", gives(SCORE, BAND), gives(BAND, SCORE)),
    harmless("a double output is a float", gives(SCORE), gives(column("score", "float"))),
    harmless("a float output is a double", gives(column("score", "float")), gives(SCORE)),
    harmless("a long output is an integer", gives(column("n", "long")), gives(column("n", "integer"))),
    harmless("probabilities are of 32 bits", gives(tensor("float64", -1, 2)), gives(tensor("float32", -1, 2))),
    harmless("labels are of 32 bits", gives(tensor("int64", -1)), gives(tensor("int32", -1))),
    harmless("labels are unsigned", gives(tensor("int64", -1)), gives(tensor("uint8", -1))),
    harmless("an optional output is always there", gives(SCORE, optional("band", "string")), gives(SCORE, BAND)),
    harmless("an output that was anything is text", gives(column("text", "any")), gives(column("text", "string"))),
    harmless("the number of classes is said", gives(tensor("float64", -1, -1)), gives(tensor("float64", -1, 3))),
    harmless("a list of doubles is one of floats", gives(column("p", array("double"))), gives(column("p", array("float")))),
    harmless("an optional output property is always there", gives(column("o", record(x_="long"))), gives(column("o", record(x="long")))),
    harmless("output properties are in another order", gives(column("o", record(x="long", y="long"))), gives(column("o", record(y="long", x="long")))),
]  # fmt: skip

T = param("threshold", "double", 0.5)
STYLE = {"type": "object", "properties": {"tone": {"type": "string", "required": True}}}
TONE = {"tone": "dry"}
PARAMS = [
    breaks("a param is gone", tuned(T), tuned(), "param 'threshold' is gone"),
    breaks("a param is renamed", tuned(T), tuned(param("treshold", "double", 0.5)), "'treshold'"),
    breaks("one of two params is gone", tuned(T, param("top_k", "long", 5)), tuned(T), "param 'top_k'"),
    breaks("a param has another default", tuned(T), tuned(param("threshold", "double", 0.7)), "0.7"),
    breaks("a param has a default, and had none", tuned(param("seed", "long", None)), tuned(param("seed", "long", 7)), "None"),
    breaks("a param has lost its default", tuned(param("seed", "long", 7)), tuned(param("seed", "long", None)), "7"),
    breaks("a switch is turned", tuned(param("explain", "boolean", False)), tuned(param("explain", "boolean", True)), "True"),
    breaks("a list param has another default", tuned(param("stop", "string", ["."], [-1])), tuned(param("stop", "string", [], [-1])), "'stop'"),
    breaks("a number param is text", tuned(T), tuned(param("threshold", "string", "0.5")), "double"),
    breaks("a fraction param is a whole number", tuned(param("t", "double", 1.0)), tuned(param("t", "long", 1)), "double"),
    breaks("a long param is an integer", tuned(param("n", "long", 1)), tuned(param("n", "integer", 1)), "long"),
    breaks("a flag param is a number", tuned(param("x", "boolean", True)), tuned(param("x", "long", 1)), "boolean"),
    breaks("a param is a list", tuned(param("stop", "string", ".")), tuned(param("stop", "string", ["."], [-1])), "list of string"),
    breaks("a list param is a scalar", tuned(param("stop", "string", ["."], [-1])), tuned(param("stop", "string", ".")), "list of string"),
    breaks("an object param has lost a property", tuned(param("s", record(tone="string", n_="long"), TONE)), tuned(param("s", STYLE, TONE)), "'s.n'"),
    breaks("an object param requires a property", tuned(param("s", STYLE, TONE)), tuned(param("s", record(tone="string", n="long"), TONE)), "'s.n'"),
    breaks("an object param is text", tuned(param("s", STYLE, TONE)), tuned(param("s", "string", "dry")), "object"),
    harmless("a param is new", tuned(), tuned(T)),
    harmless("a second param is new", tuned(T), tuned(T, param("top_k", "long", 5))),
    harmless("the params are in another order", tuned(T, param("k", "long", 5)), tuned(param("k", "long", 5), T)),
    harmless("a param is wider", tuned(param("k", "integer", 5)), tuned(param("k", "long", 5))),
    harmless("a whole-number param takes fractions, same default", tuned(param("t", "long", 1)), tuned(param("t", "double", 1.0))),
    harmless("a float param is a double", tuned(param("t", "float", 0.5)), tuned(param("t", "double", 0.5))),
    harmless("a param's default is NaN as before", tuned(param("t", "double", math.nan)), tuned(param("t", "double", math.nan))),
    harmless("a param is written in MLflow's older way", tuned({"name": "threshold", "dtype": "double", "default": 0.5, "shape": None}), tuned(T)),
    harmless("an object param takes one property more", tuned(param("s", STYLE, TONE)), tuned(param("s", record(tone="string", n_="long"), TONE))),
]  # fmt: skip

SIGNATURES: list[Case] = [*PAIRS, *INSIDE, *INPUTS, *OUTPUTS, *PARAMS]

CLASSES = [
    breaks("two classes have changed places", ["no", "yes"], ["yes", "no"], "order"),
    breaks("three classes go round", ["a", "b", "c"], ["b", "c", "a"], "order"),
    breaks("a class is new", ["cat", "dog"], ["cat", "dog", "fox"], "'fox'"),
    breaks("a class is gone", ["cat", "dog", "fox"], ["cat", "dog"], "'fox'"),
    breaks("a class is renamed", ["cat", "dog"], ["cat", "hound"], "'dog'"),
    breaks("the classes are in capitals", ["late", "on time"], ["LATE", "ON TIME"], "'late'"),
    breaks("numbers are text", [0, 1], ["0", "1"], "'0'"),
    breaks("the labels are counted from one", [0, 1, 2], [1, 2, 3], "labels 0"),
    harmless("the classes are the same", ["a", "b"], ["a", "b"]),
    harmless("whole numbers are written with a point", [0, 1], [0.0, 1.0]),
    harmless("flags are 0 and 1", [False, True], [0, 1]),
    harmless("the champion declares none", None, ["a", "b"]),
    harmless("the challenger declares none", ["a", "b"], None),
]  # fmt: skip
