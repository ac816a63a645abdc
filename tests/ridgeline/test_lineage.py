from ridgeline.lineage import lineage


def test_lineage_leads_back_to_the_first_step(store, runs):
    origin = lineage(store, runs[2][1])
    assert origin.execution.component == "double"
    assert origin.inputs["number"].ref == runs[2][0]
    assert origin.inputs["number"].execution.parts.params == {"value": 2, "fail": False}


def test_lineage_of_an_unrecorded_artifact_is_empty(store):
    assert lineage(store, f"Number/{'0' * 64}").execution is None
