"""infra/kuberay: the manifests for KubeRay 1.7."""

import json
import shlex

import pytest
import yaml
from deployment import INFRA, SECRET_NAME, SECRET_VALUE, assert_image_is_pinned, pinned, strings

from pipelines.cli import VERBS
from pipelines.cluster.shipment import PASSED_VARIABLES, job_variables
from pipelines.recipes import RECIPES
from pipelines.workflows import WORKFLOWS

FOLDER = INFRA / "kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
# The fields of ray.io/v1 that may stand in these manifests; one that is misspelt the API server would drop in silence.
CLUSTER_FIELDS = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"}
CLUSTER_FIELDS |= {"workerGroupSpecs", "headServiceAnnotations", "suspend", "gcsFaultToleranceOptions", "managedBy"}
HEAD_FIELDS = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
WORKER_FIELDS |= {"idleTimeoutSeconds", "scaleStrategy", "suspend", "resources", "labels"}
JOB_FIELDS = {"entrypoint", "submissionMode", "rayClusterSpec", "clusterSelector", "backoffLimit", "metadata", "jobId"}
JOB_FIELDS |= {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "runtimeEnvYAML"}
JOB_FIELDS |= {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "suspend", "deletionStrategy"}


def document(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_specs() -> dict[str, dict]:
    return {
        "raycluster.yaml": document("raycluster.yaml")["spec"],
        "rayjob.yaml": document("rayjob.yaml")["spec"]["rayClusterSpec"],
    }


def pods(spec: dict) -> list[dict]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


each_cluster = pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])


def test_each_file_is_one_document_of_a_known_kind():
    kinds = {path.name: (document(path.name)["apiVersion"], document(path.name)["kind"]) for path in FILES}
    assert kinds == {
        "raycluster.yaml": ("ray.io/v1", "RayCluster"),
        "rayjob.yaml": ("ray.io/v1", "RayJob"),
        "services.yaml": ("v1", "ConfigMap"),
    }


@each_cluster
def test_only_known_fields_stand_in_a_cluster(name):
    spec = cluster_specs()[name]
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert all(isinstance(value, str) for value in spec["headGroupSpec"]["rayStartParams"].values())
    assert len({group["groupName"] for group in spec["workerGroupSpecs"]}) == len(spec["workerGroupSpecs"])


@each_cluster
def test_the_ray_version_is_the_pinned_one_and_every_image_too(name):
    spec = cluster_specs()[name]
    assert spec["rayVersion"] == pinned("ray")
    for pod in pods(spec):
        for container in pod["containers"]:
            assert_image_is_pinned(container["image"])


@each_cluster
def test_every_pod_is_a_valid_pod_of_kubernetes(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for pod in pods(cluster_specs()[name]):
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(manifest, "1.34", strict=True)


@each_cluster
def test_containers_have_limits_and_take_settings_by_reference(name):
    for pod in pods(cluster_specs()[name]):
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert "env" not in container
            sources = container["envFrom"]
            assert {"configMapRef": {"name": "medmamba-services"}} in sources
            assert {"secretRef": {"name": "medmamba-s3"}} in sources


@each_cluster
def test_the_token_is_on_and_the_autoscaler_is_not_bypassed(name):
    spec = cluster_specs()[name]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert all(pod["restartPolicy"] == "Never" for pod in pods(spec))


def test_the_job_runs_a_real_command_of_the_shipped_packages():
    job = document("rayjob.yaml")["spec"]
    assert set(job) <= JOB_FIELDS
    words = shlex.split(job["entrypoint"])
    assert words[:3] == ["python", "-m", "pipelines"]
    assert words[3] in VERBS
    assert words[3] != "run" or words[4] in WORKFLOWS
    assert words[words.index("--recipe") + 1] in RECIPES
    assert job["submissionMode"] == "K8sJobMode"  # it waits for the workers; SidecarMode begins with the head
    assert "clusterSelector" not in job  # this cluster is the job's own
    assert job["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in job  # one or the other


@each_cluster
def test_what_a_placement_needs_exists_before_the_first_task(name):
    spec = cluster_specs()[name]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (training,) = (group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert training["minReplicas"] >= 1
    (container,) = training["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert int(container["resources"]["limits"]["cpu"]) >= 1


def test_the_two_clusters_are_the_same():
    cluster, job = cluster_specs().values()
    assert json.dumps(cluster, sort_keys=True) == json.dumps(job, sort_keys=True)


def test_the_services_are_addresses_without_secrets():
    services = document("services.yaml")["data"]
    assert set(services) <= set(PASSED_VARIABLES)
    assert services.items() <= job_variables(services).items()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_manifest_holds_a_secret(path):
    for text in strings(document(path.name)):
        assert not SECRET_VALUE.search(text)
    assert not any(SECRET_NAME.search(name) for name in document("services.yaml")["data"])
