from stpm.models.libraries import NodeVersions, VersionCheck, installed_versions

FIRST = {"python": "3.11.7", "torch": "2.13.0", "openvino": "2026.4.1"}
OTHER = {"python": "3.11.7", "torch": "2.14.1", "pillow": "13.0.0"}


def test_other_versions_are_described_once_with_their_first_node() -> None:
    check = VersionCheck(FIRST)
    found = (("a", FIRST), ("b", OTHER), ("c", OTHER), ("a", FIRST))
    said = [check.add(NodeVersions(*each)) for each in found]
    assert [bool(each) for each in said] == [False, True, False, False]
    assert said[1] == (
        "this run began with torch 2.13.0, openvino 2026.4.1, pillow missing, but node b has torch 2.14.1, openvino "
        "missing, pillow 13.0.0: results may differ slightly. Install deploy/constraints.txt on all nodes"
    )
    assert "node d has torch 3" in check.add(NodeVersions("d", FIRST | {"torch": "3"}))
    # Without a record the first node is the measure.
    check = VersionCheck()
    assert check.add(NodeVersions("a", OTHER)) == check.add(NodeVersions("b", OTHER)) == ""
    assert "began with torch 2.14.1, pillow 13.0.0," in check.add(NodeVersions("c", FIRST))
    assert installed_versions().keys() >= {"python", "torch", "timm", "ray", "numpy", "pillow"}
