import base64
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from components.reports.evaluation import CalibrationBins, render
from ridgeline.artifacts.examples import Examples, ExamplesFacts, Normalization, write_split
from ridgeline.artifacts.model import LayerSparsity, Model, ModelFacts
from ridgeline.artifacts.model_evaluation import ClassMetrics, Comparison, Mistake, ModelEvaluationFacts, Verdict

NAMES = ("cat", "<b>&", "dog")
NUM_TEST = 6
HISTORY = {
    "loss": [1.2, 0.9],
    "val_loss": [1.3, 1.1],
    "accuracy": [0.3, 0.5],
    "val_accuracy": [0.25, 0.4375],
}
NORMALIZATION = Normalization(kind="unit", mean=0, deviation=255)
FACTS = ModelEvaluationFacts(
    dataset="tiny:1.0.0",
    model_digest="ab" * 32,
    num_examples=NUM_TEST,
    loss=1.25,
    cross_entropy=1.125,
    accuracy=0.5,
    accuracy_interval=(0.1876, 0.8124),
    calibration_error=0.0625,
    classes=tuple(ClassMetrics(name=n, precision=0.25, recall=0.5, f1=0.333, num_examples=2) for n in NAMES),
    confusion_matrix=((1, 1, 0), (0, 1, 1), (1, 0, 1)),
    mistakes=(
        Mistake(index=5, label=2, predicted=0, probability=0.875),
        Mistake(index=1, label=0, predicted=1, probability=0.75),
    ),
    verdict=Verdict(blessed=False, reasons=("accuracy 0.5 < 0.75 (min_accuracy)", "recall of <b>& 0.5 >= 0.2")),
    synthetic=False,
)
COMPARISON = Comparison(
    model_digest="cd" * 32,
    accuracy=0.625,
    accuracy_interval=(0.2999, 0.8654),
    class_recalls=(0.75, 0.5, 0.25),
    only_champion_right=1234,
    only_candidate_right=5,
    p_value=0.0123456,
)
COUNTS = np.array([0, 2, 4])
BINS = CalibrationBins(counts=COUNTS, confidence=np.array([0, 0.5, 0.8]), accuracy=np.array([0, 0.5, 0.5]))


class Page(HTMLParser):
    """The tags, attributes and visible text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def make_examples(directory, shape=(4, 4), max_shard_bytes=10**6):
    images = np.random.default_rng(5).integers(0, 256, (NUM_TEST, *shape), np.uint8)
    write_split(directory / "test", [(images, np.arange(NUM_TEST) // 2)], NUM_TEST, shape, max_shard_bytes)
    return Examples.seal(
        directory,
        ExamplesFacts(
            dataset="tiny:1.0.0",
            image_shape=shape,
            class_names=NAMES,
            num_examples={"train": 0, "validation": 0, "test": NUM_TEST},
            normalization=NORMALIZATION,
            synthetic=False,
        ),
    )


def make_model(directory, history=HISTORY):
    directory.mkdir(exist_ok=True)
    (directory / "history.json").write_text(json.dumps(history), encoding="utf-8")
    return Model.seal(
        directory,
        ModelFacts(
            dataset="tiny:1.0.0",
            image_shape=(4, 4),
            class_names=NAMES,
            normalization=NORMALIZATION,
            params={"epochs": 2, "penalty": {"l1": 0.01, "solver": "proximal"}, "hidden": [5]},
            num_parameters=1234,
            metrics={},
            sparsity=(LayerSparsity(name="hidden", num_weights=80, num_zeros=20),),
            num_eliminated_pixels=4,
            num_eliminated_units=1234,
            synthetic=False,
        ),
    )


@pytest.fixture(scope="module")
def network():
    import keras

    network = keras.Sequential(
        [
            keras.Input((4, 4), dtype="uint8", name="images"),
            keras.layers.Rescaling(1 / 255, name="normalize"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(5, name="hidden"),
            keras.layers.Dense(3, activation="softmax", name="probabilities"),
        ]
    )
    kernel = np.linspace(-1, 1, 80, dtype=np.float32).reshape(16, 5)
    kernel[:4] = 0
    network.get_layer("hidden").set_weights([kernel, np.zeros(5)])
    network.get_layer("probabilities").set_weights([np.zeros((5, 3)), np.zeros(3)])
    return network


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return make_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def html(examples, model, network):
    return render(FACTS, BINS, examples, model, network)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def images(page):
    """The decoded images of a page by their text alternatives."""
    decoded = {}
    for attributes in page.all("img"):
        media_type, content = re.fullmatch(r"data:(image/[a-z+]+);base64,(.+)", attributes["src"]).groups()
        decoded[attributes["alt"]] = (media_type, base64.b64decode(content, validate=True))
    return decoded


def test_the_page_needs_nothing_from_outside(html, page):
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|//|<script|<link|url\(|@import|javascript:", strip_images(html), re.IGNORECASE)
    assert len(page.all("style")) == 1
    assert not any({"style", "href", "onclick", "onload"} & attributes.keys() for _, attributes in page.tags)


def strip_images(html):
    return re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", html)


def test_figures_are_valid_svg_that_names_only_namespaces(page):
    figures = [content for media_type, content in images(page).values() if media_type == "image/svg+xml"]
    assert len(figures) == 5  # loss, accuracy, reliability, two kernels
    for figure in figures:
        assert ElementTree.fromstring(figure).tag == "{http://www.w3.org/2000/svg}svg"
        urls = set(re.findall(rb"https?://[^\s\"']+", figure))
        assert all(url.startswith(b"http://www.w3.org/") for url in urls)
        assert b"<script" not in figure


def test_every_image_has_its_own_text_alternative(page):
    alternatives = [attributes["alt"] for attributes in page.all("img")]
    assert all(alternatives)
    assert len(set(alternatives)) == len(alternatives) == 8


def test_the_page_shows_the_metrics(page):
    for text in (
        "Not blessed",
        "accuracy 0.5 < 0.75 (min_accuracy)",
        "50.00 %",
        "18.76 to 81.24 %",
        "1.1250",
        "loss with penalty 1.2500",
        "0.0625",
        "1,234",
        "25.0 % of the kernels' weights are zero",
        "train 0.9000, validation 1.1000",
        "hidden: 25.0 % of 80 weights are exactly zero",
        "probabilities: 100.0 % of 15 weights are exactly zero",
        "dog cat 87.5 %",
        "penalty.l1 0.01",
        "penalty.solver proximal",
        "hidden [5]",
        "tiny:1.0.0",
        FACTS.model_digest,
    ):
        assert text in page.text


def test_the_page_maps_the_eliminated_pixels(page):
    text = "4 of 16 input pixels are eliminated: all their outgoing weights are zero"
    assert f"{text} (orange)." in page.text
    media_type, content = images(page)[f"Map of the image: {text}."]
    assert media_type == "image/png"
    orange = (decode(content) == [0xD5, 0x5E, 0x00]).all(axis=2)
    np.testing.assert_array_equal(orange, np.arange(16).reshape(4, 4) < 4)


def test_the_page_counts_the_eliminated_units(page):
    assert "1,234 hidden units or channels are eliminated" in page.text


def test_a_page_without_eliminated_pixels_says_so(examples, model, network):
    import keras

    dense = keras.models.clone_model(network)
    dense.set_weights([np.ones_like(weight) for weight in network.get_weights()])
    assert "No input pixel is eliminated" in Page(render(FACTS, BINS, examples, model, dense)).text


def test_the_page_names_the_examples_it_was_measured_on(page, examples):
    assert examples.digest in page.text


def test_the_confusion_matrix_is_a_table(html):
    table = html[html.index('<table class="matrix">') :]
    table = table[: table.index("</table>")]
    cells = re.findall(r'<td class="(\w+)">(\d+)</td>', table)
    assert [int(count) for _, count in cells] == [n for row in FACTS.confusion_matrix for n in row]
    # Half of a row: the square root of 0.5, of nine shades, is 6.
    assert [shade for shade, _ in cells[:3]] == ["hit6", "miss6", "none"]


def test_names_are_escaped(html, page):
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    assert page.text.count("<b>&") == html.count("&lt;b&gt;&amp;") - 1  # one is in an image's text alternative


def test_the_banner_shows_only_for_synthetic_data(html, examples, model, network):
    assert "synthetic" not in html.lower()
    synthetic = render(FACTS.model_copy(update={"synthetic": True}), BINS, examples, model, network)
    assert "SYNTHETIC" in Page(synthetic).text


def test_a_blessed_model_is_called_blessed(examples, model, network):
    verdict = Verdict(blessed=True, reasons=("accuracy 0.5 >= 0.25 (min_accuracy)",))
    text = Page(render(FACTS.model_copy(update={"verdict": verdict}), BINS, examples, model, network)).text
    assert "Blessed" in text
    assert "Not blessed" not in text
    assert "accuracy 0.5 >= 0.25 (min_accuracy)" in text


def test_a_forced_blessing_is_shown_with_its_reason(examples, model, network):
    verdict = Verdict(blessed=True, reasons=("accuracy 0.5 < 0.75", "forced: <i>demo</i>"), forced="<i>demo</i>")
    html = render(FACTS.model_copy(update={"verdict": verdict}), BINS, examples, model, network)
    assert "<i>demo" not in html
    text = Page(html).text
    assert "Blessed by force A person blessed this model although a check failed. Reason: <i>demo</i>" in text
    assert "accuracy 0.5 < 0.75" in text


def test_the_champion_is_shown_beside_the_model(page, examples, model, network):
    assert "Against the champion" not in page.text
    text = Page(render(FACTS.model_copy(update={"comparison": COMPARISON}), BINS, examples, model, network)).text
    for part in (
        "The champion alone is right on 1,234 of them, this model alone on 5.",
        "probability p = 0.01235",
        "Accuracy 50.00 % 62.50 % -12.50",
        "95 % interval 18.76 to 81.24 29.99 to 86.54",
        "Recall of cat 50.0 % 75.0 % -25.0",
        "Recall of dog 50.0 % 25.0 % +25.0",
        COMPARISON.model_digest,
    ):
        assert part in text


def test_equal_input_gives_equal_bytes_with_other_matplotlib_settings(html, examples, model, network):
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "lines.linewidth": 9}):
        assert render(FACTS, BINS, examples, model, network) == html
        assert matplotlib.rcParams["font.size"] == 30


def test_the_mistakes_show_their_own_images_also_from_shards(tmp_path, page, model, network):
    sharded = make_examples(tmp_path / "examples", max_shard_bytes=32)
    assert len(sharded.split("test").shards) == 3
    assert images(Page(render(FACTS, BINS, sharded, model, network))) == images(page)
    media_type, content = images(page)["Test image 5: dog, taken for cat"]
    assert media_type == "image/png"
    np.testing.assert_array_equal(decode(content), sharded.split("test").images[5])


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_large_colour_images_are_scaled_down(tmp_path, model, network):
    large = make_examples(tmp_path / "examples", shape=(300, 200, 3))
    page = Page(render(FACTS, BINS, large, model, network))
    assert decode(images(page)["Test image 5: dog, taken for cat"][1]).shape == (96, 64, 3)


def test_a_page_without_mistakes_says_so(examples, model, network):
    assert "None kept." in Page(render(FACTS.model_copy(update={"mistakes": ()}), BINS, examples, model, network)).text


def test_a_history_without_validation_is_drawn(tmp_path, examples, network):
    model = make_model(tmp_path / "model", {"loss": [1.0], "accuracy": [0.5]})
    assert "After the last epoch: train 1.0000." in Page(render(FACTS, BINS, examples, model, network)).text


def test_the_page_of_many_mistakes_is_below_one_megabyte(tmp_path, model, network):
    examples = make_examples(tmp_path / "examples", shape=(28, 28))
    mistakes = tuple(Mistake(index=i % NUM_TEST, label=0, predicted=1, probability=0.5) for i in range(100))
    html = render(FACTS.model_copy(update={"mistakes": mistakes}), BINS, examples, model, network)
    assert len(html.encode()) < 10**6
