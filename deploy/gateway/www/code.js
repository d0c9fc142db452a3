// Lines that send the image in hand from elsewhere, by client. The key itself is never among them.

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const python = (text) => JSON.stringify(text); // a string of JSON is one of Python
const os = (hasKey) => (hasKey ? "import os\n\n" : "");
const predict = ({ url, topK }) => new URL(`predict?top_k=${topK}`, url).href;

/** The Open Inference Protocol by tritonclient: over HTTP or gRPC, the same but for the connection. */
const triton = (kind, connect, keyHeader) => (request) => {
  const { file, model, topK, hasKey } = request;
  const key = hasKey ? `\n    headers={${keyHeader}: os.environ["API_KEY"]},` : "";
  return `# pip install "tritonclient[${kind}]"
${os(hasKey)}import numpy as np
import tritonclient.${kind} as v2

with open(${python(file.name)}, "rb") as file:
    body = file.read()
image = v2.InferInput("image", [1], "BYTES")
image.set_data_from_numpy(np.array([body], dtype=object))
${connect(request)}
answer = client.infer(
    ${python(model)}, [image], parameters={"top_k": ${topK}},${key}
)
print(answer.as_numpy("label"))
print(answer.as_numpy("confidence"))
`;
};

const secure = ({ url }) => (url.protocol === "https:" ? ", ssl=True" : "");

export const CLIENTS = {
  curl({ url, file, topK, hasKey }) {
    const key = hasKey ? ' \\\n  -H "X-API-Key: $API_KEY"' : "";
    const type = file.type || "application/octet-stream";
    const address = shell(predict({ url, topK }));
    return `curl ${address}${key} \\\n  -H ${shell(`Content-Type: ${type}`)} --data-binary @${shell(file.name)}\n`;
  },

  Python(request) {
    const { file, hasKey } = request;
    const key = hasKey ? ', headers={"X-API-Key": os.environ["API_KEY"]}' : "";
    return `# pip install requests
${os(hasKey)}import requests

url = ${python(predict(request))}
with open(${python(file.name)}, "rb") as file:
    answer = requests.post(url, data=file${key})
print(answer.json())
`;
  },

  "V2 over HTTP": triton(
    "http",
    (request) => {
      const place = request.url.host + request.url.pathname.replace(/\/$/, "");
      return `client = v2.InferenceServerClient(${python(place)}${secure(request)})`;
    },
    '"X-API-Key"',
  ),

  "V2 over gRPC": triton(
    "grpc",
    (request) =>
      `port = "…"  # GATEWAY_GRPC_PORT of the server
client = v2.InferenceServerClient(${python(`${request.url.hostname}:`)} + port${secure(request)})`,
    '"x-api-key"', // of gRPC's metadata, which has lower case alone
  ),
};
