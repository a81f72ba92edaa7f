import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.schema import Field, Schema, SchemaError, parse_schema
from tests.test_datasets import patient

AD = '[ad.ad_id]\nkind = "category"\n'
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6).filter(
    lambda name: name not in ("user_id", "ad_id")
)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    # Fields that share a vocabulary share its buckets and its min_count.
    vocabularies = draw(st.dictionaries(names, st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1, max_size=3))
    fields = [Field("ad_id", "ad", "category", "ad_id", missing=draw(st.sampled_from(["padding", "unknown"])))]
    for side in ("user", "context", "ad"):
        for name in draw(st.lists(names, unique=True, max_size=3)):
            kind = draw(st.sampled_from(["category", "list", "number"]))
            if kind == "number":
                missing = draw(st.floats(allow_nan=False, allow_infinity=False, width=32)) + 0.0  # no -0.0
                fields.append(Field(name, side, kind, name, transform=draw(st.sampled_from(["none", "log", "standard"])), missing=missing))
                continue
            vocabulary, (buckets, min_count) = draw(st.sampled_from(sorted(vocabularies.items())))
            length = draw(st.integers(1, 1_000)) if kind == "list" else 1
            fields.append(
                Field(name, side, kind, vocabulary, buckets, min_count, length, missing=draw(st.sampled_from(["padding", "unknown"])))
            )
    order = {"user": 0, "context": 1, "ad": 2}
    fields.sort(key=lambda field: order[field.side])
    history = [
        "ad_id",
        *draw(st.lists(st.sampled_from([f.name for f in fields if f.side == "ad" and f.name != "ad_id"] or ["ad_id"]), unique=True)),
    ]
    length = draw(st.integers(0, 10_000))
    return Schema(draw(names), tuple(fields), tuple(dict.fromkeys(history)) if length else (), length)


@patient
@given(schemas())
def test_a_schema_written_and_read_is_the_same(schema: Schema) -> None:
    again = parse_schema(schema.to_toml())
    assert again == schema
    assert again.canonical() == schema.canonical()


def test_defaults_and_layouts() -> None:
    schema = parse_schema(
        'name = "s"\nhistory = { length = 7, fields = ["ad_id", "price", "tags"] }\n'
        '[user]\ninterests = { kind = "list", length = 3, vocabulary = "tags" }\n'
        'age = { kind = "category" }\nincome = { kind = "number" }\n'
        '[context]\nslot = { kind = "category" }\nhour = { kind = "number" }\n'
        '[ad]\nad_id = { kind = "category" }\nprice = { kind = "number" }\ntags = { kind = "list", length = 2 }\n'
    )
    assert schema.field("user", "interests") == Field("interests", "user", "list", "tags", 0, 1, 3, "none", "padding")
    assert schema.field("user", "income") == Field("income", "user", "number", "income", missing=0.0)
    assert schema.field("ad", "age") is None
    user = schema.layouts["user"]
    # The context's fields stand after the user's; ids and numbers are two blocks.
    assert [(slot.field.path, slot.start, slot.stop) for slot in user.ids] == [
        ("user.interests", 0, 3),
        ("user.age", 3, 4),
        ("context.slot", 4, 5),
    ]
    assert [(slot.field.path, slot.start, slot.stop) for slot in user.numbers] == [("user.income", 0, 1), ("context.hour", 1, 2)]
    assert [field.path for field in schema.history] == ["ad.ad_id", "ad.price", "ad.tags"]
    assert schema.tensors == {
        "user_ids": ("user", 5),
        "user_numbers": ("user", 2),
        "history_ids": ("history", 3),
        "history_numbers": ("history", 1),
        "ad_ids": ("ad", 3),
        "ad_numbers": ("ad", 1),
    }


def test_blocks_without_columns_are_no_tensors() -> None:
    assert parse_schema('name = "s"\n' + AD).tensors == {"ad_ids": ("ad", 1)}
    assert parse_schema('name = "s"\n[ad.price]\nkind = "number"\n').tensors == {"ad_numbers": ("ad", 1)}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("", "kind is None"),
        ('kind = "text"', "kind is 'text'; it must be one of category, list, number"),
        ('kind = ["list"]', "kind is"),
        ('kind = "category"\nbucket = 3', r"unknown settings \['bucket'\]"),
        ('kind = "category"\nbuckets = -1', "buckets must be"),
        ('kind = "category"\nbuckets = 1.5', "buckets must be"),
        ('kind = "category"\nbuckets = true', "buckets must be"),
        ('kind = "category"\nbuckets = 2147483649', "buckets must be"),
        ('kind = "category"\nmin_count = 0', "min_count must be"),
        ('kind = "category"\nvocabulary = ""', "vocabulary must be"),
        ('kind = "number"\nmin_count = 2', "a number has neither buckets, min_count nor max_size"),
        ('kind = "category"\nmax_size = -1', "max_size must be"),
        ('kind = "category"\nmax_size = 3\nbuckets = 9', "and buckets has none"),
        ('kind = "category"\nvocabulary = 3', "vocabulary must be"),
        ('kind = "category"\nlength = 2', "only a list or a vector has a length"),
        ('kind = "list"\nlength = 0', "length must be"),
        ('kind = "list"\nlength = 1001', "length must be"),
        ('kind = "category"\ntransform = "log"', "only a number has a transform"),
        ('kind = "category"\nmissing = "zero"', "missing must be one of padding, unknown"),
        ('kind = "category"\nmissing = 0', "missing must be one of"),
        ('kind = "number"\ntransform = "sqrt"', "transform must be one of none, log, standard"),
        ('kind = "number"\nmissing = "padding"', "missing must be a finite number"),
        ('kind = "number"\nmissing = inf', "missing must be a finite number"),
        ('kind = "number"\nmissing = nan', "missing must be a finite number"),
        ('kind = "number"\nmissing = true', "missing must be a finite number"),
        ('kind = "number"\nmissing = 1e300', "missing must be a finite number"),
    ],
)
def test_an_impossible_field_is_named(entries: str, message: str) -> None:
    with pytest.raises(SchemaError, match=f"^field user.age: .*{message}"):
        parse_schema(f'name = "s"\n{AD}[user.age]\n{entries}\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not a TOML text"),
        (AD, 'name = "..." is missing'),
        ('name = ""\n' + AD, 'name = "..." is missing'),
        ('name = "s"\nnegative_sampling = 0.1\n' + AD, r"unknown entries \['negative_sampling'\]"),
        ('name = "s"\nitem = 1\n' + AD, r"unknown entries \['item'\]"),
        ('name = "s"\nuser = 3\n' + AD, "user: expected tables"),
        ('name = "s"\nuser.age = 3\n' + AD, "field user.age: expected a table"),
        ('name = "s"\n[user.age]\nkind = "category"\n', "no ad field"),
        ('name = "s"\nhistory = 3\n' + AD, r"\[history\] takes exactly"),
        ('name = "s"\nhistory = { length = 3 }\n' + AD, r"\[history\] takes exactly"),
        ('name = "s"\nhistory = { length = 0, fields = ["ad_id"] }\n' + AD, r"\[history\]: length must be"),
        ('name = "s"\nhistory = { length = 10001, fields = ["ad_id"] }\n' + AD, r"\[history\]: length must be"),
        ('name = "s"\nhistory = { length = 3, fields = [] }\n' + AD, 'starts with "ad_id"'),
        ('name = "s"\nhistory = { length = 3, fields = ["genre", "ad_id"] }\n' + AD, 'starts with "ad_id"'),
        ('name = "s"\nhistory = { length = 3, fields = "ad_id" }\n' + AD, 'starts with "ad_id"'),
        ('name = "s"\nhistory = { length = 3, fields = ["ad_id", "ad_id"] }\n' + AD, "names a field twice"),
        ('name = "s"\nhistory = { length = 3, fields = ["ad_id", "genre"] }\n' + AD, r"\['genre'\] are not ad fields"),
        ('name = "s"\n[user.ad_id]\nkind = "category"\n' + AD, "field user.ad_id: ad_id belongs to the other side"),
        ('name = "s"\n[context.user_id]\nkind = "category"\n' + AD, "field context.user_id: user_id belongs to the other side"),
        ('name = "s"\n[ad.ad_id]\nkind = "number"\n', "field ad.ad_id: an identity is a category"),
        ('name = "s"\n[user.a]\nkind = "list"\nvocabulary = "ad_id"\nbuckets = 3\n' + AD, "user.a and ad.ad_id share a vocabulary but not"),
    ],
)
def test_an_impossible_schema_is_a_sentence(text: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        parse_schema(text)
