#!/bin/sh
# Other gateways in the same run as nginx and ours: installs each into an environment of its own below FOLDER, then
# measures them all in turns.
#
#   loadtest/bench/gateway/peers/run.sh FOLDER [options of `evenhand bench gateway`]
#   PEERS=smg,litellm loadtest/bench/gateway/peers/run.sh FOLDER     # only these
set -eu
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [options of evenhand bench gateway]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
bin=$here/../../../../.venv/bin
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

wanted() {  # NAME
    case ",${PEERS:-$1}," in *",$1,"*) true ;; *) false ;; esac
}

installed() {  # NAME PACKAGE...
    name=$1
    shift
    [ -e "$folder/$name/installed" ] && return
    echo "installing $*" >&2
    "${PYTHON:-python3}" -m venv "$folder/$name"
    "$folder/$name/bin/pip" install --quiet --disable-pip-version-check "$@"
    touch "$folder/$name/installed"
}

plainly() {
    installed plain aiohttp==3.14.5 fastapi==0.165.0 httpx==0.28.1 uvicorn==0.54.0 uvloop==0.23.0 httptools==0.9.0 \
        orjson==3.13.0
}

address='--host 127.0.0.1 --port {port}'
routed="$address --worker-urls {backend} --prometheus-host 127.0.0.1 --prometheus-port 29000"
plain="env ENGINE={backend} '$folder/plain/bin/uvicorn' --app-dir '$here' $address --loop uvloop --http httptools
    --no-access-log --log-level warning"
quiet='env NO_PROXY=* DO_NOT_TRACK=1 LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_LOG=ERROR LITELLM_MODE=PRODUCTION
    LITELLM_MASTER_KEY={key} ENGINE={backend}/v1'

if wanted vllm-router; then
    installed vllm-router vllm-router==0.1.17
    start="'$folder/vllm-router/bin/vllm-router' $routed --log-level warning"
    set -- --add "vllm-router=$start" --add "vllm-router, round robin=$start --policy round_robin" "$@"
fi
if wanted sglang-router; then
    installed sglang-router sglang-router==0.3.2
    start="'$folder/sglang-router/bin/python' -m sglang_router.launch_router $routed --log-level warn"
    set -- --add "sglang-router=$start" "$@"
fi
if wanted smg; then
    installed smg smg==1.13.0
    set -- --add "smg='$folder/smg/bin/smg' launch $routed --log-level warn" "$@"
fi
if wanted asgi-aiohttp; then
    plainly
    set -- --add "ASGI + aiohttp=$plain asgi_aiohttp:app" "$@"
fi
if wanted fastapi-httpx; then
    plainly
    set -- --add "FastAPI + httpx=$plain fastapi_httpx:app" "$@"
fi
if wanted litellm; then
    installed litellm 'litellm[proxy]==1.106.2'
    start="$quiet '$folder/litellm/bin/litellm' --config '$here/litellm.yaml' $address --num_workers 1"
    set -- --add "LiteLLM=$start" "$@"
fi
exec "$bin/evenhand" bench gateway "$@"
