"""The routes, with real models in this process."""

import io
import itertools
import shutil
import time

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from ridgeline.image_form import Form
from ridgeline.registry import Registry
from ridgeline.serving import app as app_module
from ridgeline.serving import versions
from ridgeline.serving.app import Limits, create_app

NAME = "synthetic_garments"
URL = f"/v1/models/{NAME}"


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(app_module, "POLL_SECONDS", 0.02)


@pytest.fixture
def serve(registry):
    """Start a server; return a client of it."""
    clients = []

    def serve(**options):
        client = TestClient(create_app(registry, **options), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield serve
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def images(model):
    return np.load(model.check / "images.npy")


def until(condition):
    for _ in range(500):
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen within 10 s")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def version_of(client, path=URL):
    response = client.post(f"{path}:predict", content=PNG)
    assert response.status_code == 200, response.text
    return int(response.headers["X-Model-Version"]), response.headers["X-Model-Label"]


PNG = png(np.zeros((28, 28), np.uint8))


def test_responses_are_the_evaluations_predictions(push, serve, model, images):
    push()
    client = serve()
    expected = np.load(model.check / "probabilities.npy")
    rows = client.post(f"{URL}:predict", json={"instances": images.tolist()}).json()["predictions"]
    np.testing.assert_allclose([row["probabilities"] for row in rows], expected, atol=1e-5)
    assert [row["class_id"] for row in rows] == expected.argmax(axis=1).tolist()
    assert [row["class_name"] for row in rows] == [model.facts.class_names[row["class_id"]] for row in rows]
    columns = client.post(f"{URL}:predict", json={"inputs": images.tolist()}).json()["outputs"]
    assert list(rows[0]) == list(columns) == ["class_id", "class_name", "probabilities"]
    assert columns == {name: [row[name] for row in rows] for name in ("class_id", "class_name", "probabilities")}
    file = client.post(f"{URL}:predict", content=png(images[0])).json()["predictions"]
    assert file[0]["class_name"] == rows[0]["class_name"]
    for place in ("versions/1", "labels/stable"):
        assert client.post(f"{URL}/{place}:predict", content=png(images[0])).json()["predictions"] == file


def test_image_files_are_prepared_as_the_version_says(push, serve):
    push()
    client = serve()
    transparent = io.BytesIO()
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(transparent, "PNG")

    def probabilities(content):
        return client.post(f"{URL}:predict", content=content).json()["predictions"][0]["probabilities"]

    white, black = (probabilities(png(np.full((28, 28), value, np.uint8))) for value in (255, 0))
    assert probabilities(transparent.getvalue()) == white != black
    push(Form.of_shape((28, 28), background=0))
    until(lambda: version_of(client)[0] == 2)
    assert probabilities(transparent.getvalue()) == black


def test_pushes_and_rollbacks_are_followed(push, serve, registry, store):
    client = serve()
    assert client.get("/health/ready").status_code == 503
    assert "No model has been pushed to" in client.get("/health/ready").json()["problems"][0]
    assert client.post(f"{URL}:predict", content=PNG).status_code == 404
    for version in (1, 2):
        assert push() == version
        until(lambda: client.get("/health/ready").status_code == 200)
        until(lambda number=version: version_of(client) == (number, "stable"))
    registry.rollback(store, NAME, None, reason="worse", by="", run_id="back")
    until(lambda: version_of(client) == (1, "stable"))
    gone = client.post(f"{URL}/versions/2:predict", content=PNG)
    assert (gone.status_code, gone.json()["error"]) == (
        404,
        f"Expected a version of {NAME} that is served: 1 (stable); received version 2.",
    )


def test_a_canary_answers_its_share(push, serve, registry, store):
    push()
    draws = itertools.cycle([0.05, 0.5, 0.3, 0.9])
    client = serve(draw=lambda: next(draws))
    push(canary_share=0.25)
    until(lambda: client.get(f"{URL}/labels/canary").status_code == 200)
    found = [version_of(client) for _ in range(40)]
    assert found.count((2, "canary")) == 10
    assert found.count((1, "stable")) == 30
    assert version_of(client, f"{URL}/labels/canary") == version_of(client, f"{URL}/versions/2") == (2, "canary")
    assert version_of(client, f"{URL}/labels/stable") == (1, "stable")
    states = client.get(URL).json()["model_version_status"]
    assert [(state["version"], state["state"]) for state in states] == [("1", "AVAILABLE"), ("2", "AVAILABLE")]
    assert f'ridgeline_canary_share{{model="{NAME}"}} 0.25' in client.get("/metrics").text
    registry.promote(store, NAME, reason="fine", by="", run_id="promote")
    until(lambda: client.get(f"{URL}/labels/canary").status_code == 404)
    assert {version_of(client) for _ in range(8)} == {(2, "stable")}
    metrics = client.get("/metrics").text
    assert f'ridgeline_loads_total{{model="{NAME}",outcome="loaded"}} 2.0' in metrics  # the canary stayed in memory
    assert 'label="canary"' not in metrics
    registry.start_canary(store, NAME, 1, 0.5, reason="again", by="", run_id="start")
    until(lambda: client.get(f"{URL}/labels/canary").status_code == 200)
    registry.abort(NAME, reason="enough", by="", run_id="abort")
    until(lambda: client.get(f"{URL}/labels/canary").status_code == 404)
    assert {version_of(client) for _ in range(8)} == {(2, "stable")}


@pytest.mark.parametrize("damage", ["changed", "deleted", "no model"])
def test_a_version_that_can_not_be_loaded_leaves_the_present_one(push, serve, registry, monkeypatch, caplog, damage):
    push()
    client = serve()
    folder = registry.root / NAME / "2"
    original = Registry._follow

    def follow(registry, name, *lines):  # damage it before a server can see it
        for staging in (registry.root / NAME).glob(".push-2"):
            if damage == "deleted":
                shutil.rmtree(staging)
                staging.mkdir()
            else:
                (staging / "variables" / "variables.index").write_bytes(b"damaged")
            if damage == "no model":
                monkeypatch.setattr(Registry, "expect_whole", lambda *arguments: None)
        original(registry, name, *lines)

    monkeypatch.setattr(Registry, "_follow", follow)
    push()
    problem = until(lambda: client.get("/health/ready").json()["problems"])
    assert problem[0].startswith(f"{NAME}: Cannot serve version 2: ")
    if damage != "no model":
        assert f"Expected {folder} to hold the files that were pushed; received others" in problem[0]
    assert client.get("/health/ready").status_code == 200
    assert version_of(client) == (1, "stable")
    assert f'ridgeline_problem{{model="{NAME}"}} 1.0' in client.get("/metrics").text
    assert f'ridgeline_loads_total{{model="{NAME}",outcome="failed"}} 1.0' in client.get("/metrics").text
    assert caplog.text.count("Cannot serve version 2") == 1
    push()
    until(lambda: version_of(client) == (3, "stable"))
    assert client.get("/health/ready").json() == {"status": "ready", "problems": []}


def test_a_damaged_version_is_served_once_it_is_restored(push, serve, registry, model, monkeypatch):
    monkeypatch.setattr(versions, "RETRY_SECONDS", 0.05)
    push()
    file = registry.root / NAME / "1" / "saved_model.pb"
    content = file.read_bytes()
    file.write_bytes(b"damaged")
    client = serve()
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503
    for place in ("", "/labels/stable", "/versions/1"):
        refused = client.post(f"{URL}{place}:predict", content=PNG)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        expected = f"This version of {NAME} can't be served at present. Cannot serve version 1"
        assert refused.json()["error"].startswith(expected)
        assert client.get(f"{URL}{place}").status_code == 503
    for place in ("/labels/canary", "/versions/2"):
        assert client.post(f"{URL}{place}:predict", content=PNG).status_code == 404
    file.write_bytes(content)
    until(lambda: client.get("/health/ready").status_code == 200)


def test_a_model_whose_history_is_lost_is_served(push, serve, registry):
    push()
    for file in ("history.jsonl", "history-copy.jsonl"):
        (registry.root / NAME / file).write_text("damaged\n")
    registry.store = None
    assert version_of(serve()) == (1, "stable")


def test_an_unreachable_registry_leaves_what_is_served(push, serve, registry):
    push()
    client = serve()
    registry.root.rename(registry.root.with_name("away"))
    time.sleep(0.1)
    assert version_of(client) == (1, "stable")
    registry.root.with_name("away").rename(registry.root)
    push()
    until(lambda: version_of(client) == (2, "stable"))


def test_a_model_that_was_removed_is_served_until_a_restart(push, serve, registry):
    push()
    push(model_name="shoes")
    client = serve()
    shutil.rmtree(registry.root / "shoes")
    problems = until(lambda: client.get("/health/ready").json()["problems"])
    expected = f"{registry.root} has no champion of it any more. It is served until the server is restarted."
    assert problems == [f"shoes: {expected}"]
    assert client.get("/health/ready").status_code == 200
    assert version_of(client, "/v1/models/shoes") == version_of(client) == (1, "stable")
    push(model_name="shoes")
    until(lambda: client.get("/health/ready").json()["problems"] == [])


def test_several_models_are_served(push, serve):
    push()
    push(model_name="shoes")
    client = serve()
    assert version_of(client) == version_of(client, "/v1/models/shoes") == (1, "stable")
    unknown = client.post("/v1/models/boots:predict", content=PNG)
    assert unknown.status_code == 404
    assert unknown.json() == {"error": f"Expected the name of a served model: shoes, {NAME}; received 'boots'."}
    assert 'model="boots"' not in client.get("/metrics").text


def test_metadata_is_that_of_tf_serving(push, serve):
    push()
    client = serve()
    found = client.get(f"{URL}/metadata").json()
    assert found["model_spec"] == {"name": NAME, "signature_name": "", "version": "1"}
    signature = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["method_name"] == "tensorflow/serving/predict"
    assert signature["inputs"]["images"]["dtype"] == "DT_UINT8"
    assert [d["size"] for d in signature["inputs"]["images"]["tensor_shape"]["dim"]] == ["-1", "28", "28"]
    assert signature["outputs"]["class_name"]["dtype"] == "DT_STRING"
    push(canary_share=0.5)
    until(lambda: client.get(f"{URL}/labels/canary").status_code == 200)
    for place, version in (("", "1"), ("/versions/2", "2"), ("/labels/canary", "2"), ("/labels/stable", "1")):
        assert client.get(f"{URL}{place}/metadata").json()["model_spec"]["version"] == version


def test_bad_requests_have_a_reason_and_are_counted(push, serve):
    push()
    client = serve(limits=Limits(request_mib=0.01, batch=2, seconds=1.0))
    url = f"{URL}:predict"
    for content, status, message in (
        (b"nonsense", 400, "no image in a known format"),
        (b'{"instances": []}', 400, "at least one image"),
        (b'{"instances": [1, 2, 3]}', 413, "at most 2 images"),
        (bytes(20_000), 413, "at most 0.01 MiB"),
    ):
        response = client.post(url, content=content)
        assert (response.status_code, list(response.json())) == (status, ["error"])
        assert message in response.json()["error"]
    many = client.post(url, content=(bytes(1_000) for _ in range(20)))  # without a Content-Length
    assert many.status_code == 413
    packed = client.post(url, content=PNG, headers={"Content-Encoding": "gzip"})
    assert (packed.status_code, "Content-Encoding" in packed.json()["error"]) == (415, True)
    for response in (client.get("/nothing"), client.post(f"{URL}:classify"), client.put("/metrics")):
        assert response.status_code in (404, 405)
        assert response.json()["error"].startswith("Expected a request as in docs/serving.md; received ")
    assert (
        'ridgeline_requests_total{model="synthetic_garments",status="413",version="1"} 3.0'
        in client.get("/metrics").text
    )


def test_clients_need_the_token(push, serve):
    push()
    client = serve(token="secret")
    for path in (URL, f"{URL}/metadata", "/metrics"):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            refused = client.get(path, headers=headers)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get(f"{URL}/versions/{'9' * 5_000}").status_code == 401
    assert client.post(f"{URL}:predict", content=PNG).status_code == 401
    assert client.post(f"{URL}:predict", content=PNG, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health/live").status_code == 200
    assert (client.get("/health/ready").status_code, client.get("/health/ready").json()) == (200, {"status": "ready"})


@pytest.mark.parametrize("version", ["9" * 5_000, "9" * 18, "-1", "1.0", "x", "%00"])
def test_a_version_that_is_none_is_not_found(push, serve, version):
    push()
    client = serve()
    url = f"{URL}/versions/{version}"
    for response in (client.get(url), client.get(f"{url}/metadata"), client.post(f"{url}:predict", content=PNG)):
        assert response.status_code == 404
        assert len(response.json()["error"]) < 400


def test_probabilities_that_are_no_numbers_are_an_error_of_the_model(push, serve):
    push()

    class Broken:
        image_shape, form, metadata = (28, 28), Form.of_shape((28, 28)), {}

        async def predict(self, images):
            return {"class_id": np.array([0]), "probabilities": np.array([[0.5, np.nan]], np.float32)}

    response = serve(load=lambda name, folder: Broken()).post(f"{URL}:predict", content=PNG)
    error = {"error": "Cannot predict: the model's probabilities are not finite numbers."}
    assert (response.status_code, response.json()) == (500, error)


def test_the_largest_image_file_may_be_smaller_than_for_training(push, serve):
    push(Form.of_shape((28, 28), max_image_pixels=900))
    for limit, allowed in ((None, 900), (800, 800), (2_000, 900)):
        client = serve(limits=Limits(image_pixels=limit))
        assert client.post(f"{URL}:predict", content=png(np.zeros((10, allowed // 10), np.uint8))).status_code == 200
        refused = client.post(f"{URL}:predict", content=png(np.zeros((1, allowed + 1), np.uint8)))
        assert (refused.status_code, f"over {allowed} pixels" in refused.json()["error"]) == (400, True)


def test_an_error_of_the_model_is_an_error_of_the_server(push, registry, caplog, serve):
    push()

    class Broken:
        image_shape, form, metadata = (28, 28), Form.of_shape((28, 28)), {}

        async def predict(self, images):
            raise ArithmeticError("out of memory")

    client = serve(load=lambda name, folder: Broken())
    response = client.post(f"{URL}:predict", content=PNG)
    assert (response.status_code, "log" in response.json()["error"]) == (500, True)
    assert "out of memory" not in response.text
    assert "out of memory" in caplog.text
