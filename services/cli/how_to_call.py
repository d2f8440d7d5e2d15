"""What a newcomer may type next, once a mesh serves."""

from __future__ import annotations

from pathlib import Path

QUESTION = "Explain in two sentences what a water turbine does."

HOW_TO_GET_A_KEY = """\
Requests need an API key. `penstock keys create --tenant NAME` makes one and shows it once;
clients send it as metadata `authorization: Bearer KEY`, and `make generate` takes it as KEY=.
"""

_TEXT = """\
From Python, with the stubs of this repository (.venv/bin/python has them):

    import grpc
    from penstock.v1 import generation_pb2 as pb, generation_pb2_grpc

    stub = generation_pb2_grpc.GenerationServiceStub({python_channel})
    messages = [pb.ChatMessage(role="user", content="Name three rivers.")]
    for response in stub.Generate(pb.GenerateRequest(messages=messages)):
        print(response.text, end="", flush=True)

From the command line, with server reflection and no files of ours:

    buf curl --protocol grpc {buf_option} \\
      -d '{{"prompt": "Once upon a time", "sampling": {{"max_tokens": 32}}}}' \\
      {scheme}://{address}/penstock.v1.GenerationService/Generate

From Node, in this folder, with the packages @grpc/grpc-js and @grpc/proto-loader:

    const grpc = require("@grpc/grpc-js");
    const definition = require("@grpc/proto-loader").loadSync(
      "penstock/v1/generation.proto", {{ includeDirs: ["protos"] }});
    const {{ GenerationService }} = grpc.loadPackageDefinition(definition).penstock.v1;
    new GenerationService("{address}", {node_credentials})
      .Generate({{ prompt: "Once upon a time" }})
      .on("data", (response) => process.stdout.write(response.text));
"""


def how_to_call(address: str, *, ca: Path | None = None) -> str:
    """Ways to call the mesh at `address`, from three languages. With `ca` it is a TLS port, whose
    authority stands in that file."""
    if ca is None:
        return _TEXT.format(
            address=address,
            scheme="http",
            python_channel=f'grpc.insecure_channel("{address}")',
            buf_option="--http2-prior-knowledge",
            node_credentials="grpc.credentials.createInsecure()",
        )
    read = f'grpc.ssl_channel_credentials(open("{ca}", "rb").read())'
    return _TEXT.format(
        address=address,
        scheme="https",
        python_channel=f'grpc.secure_channel("{address}", {read})',
        buf_option=f"--cacert {ca}",
        node_credentials=f'grpc.credentials.createSsl(require("fs").readFileSync("{ca}"))',
    )
