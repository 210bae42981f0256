import json
from pathlib import Path

import jsonschema
import ray
import yaml

ROOT = Path(__file__).parents[2]


def test_the_cluster_file_passes_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
