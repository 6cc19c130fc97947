"""The test server serves the real clients."""

import json
from pathlib import Path


def test_a_repository_from_creation_to_deletion(hub_server, run_python, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "sub" / "notes.txt").write_text("notes")
    out = run_python(f"""
        import json
        from pathlib import Path
        import requests
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
        api = HfApi()
        name = api.whoami()["name"]
        url = api.create_repo("me/thing")
        api.create_repo("me/thing", exist_ok=True)
        first = api.upload_folder(repo_id="me/thing", folder_path={str(folder)!r}, commit_message="all of it")
        again = api.upload_folder(repo_id="me/thing", folder_path={str(folder)!r})
        api.delete_file("sub/notes.txt", "me/thing")
        api.create_branch("me/thing", branch="dev")
        api.upload_file(path_or_fileobj=b"new", path_in_repo="sub/new.txt", repo_id="me/thing", revision="dev")
        path = hf_hub_download("me/thing", "model.safetensors")
        old = snapshot_download("me/thing", revision=first.oid)
        missing = []
        for wanted in (dict(filename="nothing.txt"), dict(filename="config.json", revision="nowhere")):
            try:
                hf_hub_download("me/thing", **wanted)
            except (EntryNotFoundError, RevisionNotFoundError) as error:
                missing.append(type(error).__name__)
        url_of_file = api.endpoint + "/me/thing/resolve/main/model.safetensors"
        part = requests.get(url_of_file, headers={{"Range": "bytes=254-257"}})
        tree = [(e.path, type(e).__name__) for e in api.list_repo_tree("me/thing", revision="dev")]
        print(json.dumps(dict(
            name=name, url=str(url), main=sorted(api.list_repo_files("me/thing")), tree=tree,
            downloaded=Path(path).read_bytes() == Path({str(folder / "model.safetensors")!r}).read_bytes(),
            old=sorted(str(p.relative_to(old)) for p in Path(old).rglob("*") if p.is_file()),
            missing=missing, status=part.status_code, part=list(part.content), sha=api.repo_info("me/thing").sha,
        )))
        api.delete_repo("me/thing")
        print(api.repo_exists("me/thing"))
    """)
    result, exists = out.strip().splitlines()
    result = json.loads(result)
    assert exists == "False"
    assert result["name"] == "me"
    assert result["url"] == f"{hub_server.endpoint}/me/thing"
    assert result["main"] == ["config.json", "model.safetensors"]
    assert result["old"] == ["config.json", "model.safetensors", "sub/notes.txt"]
    assert result["tree"] == [["config.json", "RepoFile"], ["model.safetensors", "RepoFile"], ["sub", "RepoFolder"]]
    assert result["downloaded"] is True
    assert result["missing"] == ["RemoteEntryNotFoundError", "RevisionNotFoundError"]
    assert (result["status"], result["part"]) == (206, [254, 255, 0, 1])
    assert len(result["sha"]) == 40
    uploads = [request for request in hub_server.requests if request.startswith("PUT /large/")]
    assert len(uploads) == 1  # the second upload_folder found the content already there


def test_who_may_read_and_write(hub_server, run_python):
    out = run_python("""
        import json, os
        from huggingface_hub import HfApi, create_repo
        from huggingface_hub.errors import HfHubHTTPError
        create_repo("me/secret", private=True)
        statuses = {}
        for token in ("owner", "reader", "stranger", "", "invalid"):
            os.environ["HF_TOKEN"] = token
            for action in (lambda: HfApi().repo_info("me/secret"), lambda: create_repo(f"me/of-{token}0")):
                try:
                    action()
                    status = 200
                except HfHubHTTPError as error:
                    status = error.response.status_code
                statuses.setdefault(token, []).append(status)
        print(json.dumps(statuses))
    """)
    assert json.loads(out) == {
        "owner": [200, 200],
        "reader": [200, 403],
        "stranger": [404, 403],
        "": [404, 401],
        "invalid": [401, 401],
    }
    assert set(hub_server.repos) == {("model", "me/secret"), ("model", "me/of-owner0")}


def test_a_dataset_is_streamed_and_a_metric_loaded_by_name(hub_server, run_python):
    metric = Path(__file__).parents[2] / "hf_vlm" / "metrics" / "coco_detection"
    out = run_python(f"""
        import json
        import evaluate
        from datasets import Dataset, Features, Image, List, Value, load_dataset
        from huggingface_hub import HfApi
        from PIL import Image as Pillow
        pictures = [Pillow.new("RGB", (4, 3), (i, 2 * i, 0)) for i in range(5)]
        features = Features({{"image": Image(), "boxes": List(Value("float32"))}})
        dataset = Dataset.from_dict({{"image": pictures, "boxes": [[i, 0.5] for i in range(5)]}}, features=features)
        dataset.push_to_hub("me/pictures", private=True, num_shards=2)
        stream = load_dataset("me/pictures", split="train", streaming=True)
        rows = [(example["image"].getpixel((0, 0)), example["boxes"]) for example in stream]

        HfApi().create_repo("me/coco_detection", repo_type="space", space_sdk="static")
        HfApi().upload_folder(repo_id="me/coco_detection", repo_type="space", folder_path={str(metric)!r})
        metric = evaluate.load("me/coco_detection", module_type="metric")
        boxes = {{"boxes": [[0.0, 0, 9, 9]], "labels": [0]}}
        ap = metric.compute(predictions=[boxes | {{"scores": [0.5]}}], references=[boxes])["ap"]
        print("RESULT", json.dumps(dict(rows=rows, shards=stream.num_shards, ap=ap)))
    """)
    result = json.loads(out.split("RESULT ")[1])
    assert result == {"rows": [[[i, 2 * i, 0], [i, 0.5]] for i in range(5)], "shards": 2, "ap": 1.0}
    files = hub_server.files("me/pictures", kind="dataset")
    assert sorted(files) == ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
