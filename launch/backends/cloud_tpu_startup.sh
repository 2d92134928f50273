# Runs on every VM of the run, at every boot, as root; the lines above are this run's values. It puts code and environment on
# the VM's disk, where a second boot finds them, and becomes the VM's agent.
set -uo pipefail
umask 022
export HOME="${HOME:-/root}"
vm_dir="${vm_dir/#\~/"$HOME"}"
mkdir -p "$vm_dir" || exit 1
exec >>"$vm_dir/startup.log" 2>&1
echo "--- $(date -u +%Y-%m-%dT%H:%M:%SZ) $resource"

# The agent inherits the lock: a script that is started again while it lives does nothing.
exec 9>"$vm_dir/startup.lock"
flock --nonblock 9 || { echo "the agent of this VM runs already"; exit 0; }

# A request with this VM's own credentials, which stay off the command line.
authorized() {
    local server="${GCE_METADATA_IP:-metadata.google.internal}" url="$1" token
    shift
    token="$(curl --silent --retry 5 --retry-connrefused --header 'Metadata-Flavor: Google' \
        "http://$server/computeMetadata/v1/instance/service-accounts/default/token" |
        sed -n 's/.*"access_token": *"\([^"]*\)".*/\1/p')"
    curl --fail --silent --show-error --retry 10 --retry-delay 3 --retry-all-errors --config - "$@" \
        "$url" <<<"header = \"Authorization: Bearer $token\""
}

storage() {
    local path="$1"
    shift
    authorized "${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}$path" "$@"
}

# A VM that cannot take part leaves word of why, and gives the whole TPU back: the others would wait for it, and be paid for.
give_up() {
    echo "error: $1 (VM $(hostname))"
    if [ -n "$log_url" ]; then
        storage "$log_url$(hostname).log" --request POST --header "Content-Type: text/plain" --data-binary "@$vm_dir/startup.log"
    else
        local to="$run_dir/cloud_tpu/$resource" partial=".startup-$(hostname).$$.partial"
        mkdir -p "$to" && cp "$vm_dir/startup.log" "$to/$partial" && mv "$to/$partial" "$to/startup-$(hostname).log"
    fi
    until authorized "$give_back_url" --request DELETE; do sleep 30; done
    exit 1
}

# Try a function three times: what fails on a VM that has just booted may work a moment later.
patiently() {
    "$1" || { sleep 5 && "$1"; } || { sleep 15 && "$1"; }
}

tarball() {
    if [ -n "$code_url" ]; then storage "$code_url"; else cat "$run_dir/code/$code.tar.gz"; fi
}

code_dir="$vm_dir/code/$code"
if [ ! -d "$code_dir" ]; then
    partial="$vm_dir/code/.$code.partial"
    rm -rf "$partial" && mkdir -p "$partial" || give_up "cannot write to $vm_dir"
    tarball | tar --extract --gzip --directory "$partial" || give_up "cannot fetch the code of the run"
    mv "$partial" "$code_dir"
fi

if [ -z "$python" ]; then
    environment="$vm_dir/environment"
    python="$environment/bin/python"
    locked="$(sha256sum <"$code_dir/requirements.lock")"
    if [ "$(cat "$environment/.locked" 2>/dev/null)" != "$locked" ]; then
        for pause in 5 20 60 120 240 0; do # the network of a VM that has just booted may not be there yet
            rm -rf "$environment"
            python3 -m pip install --quiet --upgrade --target "$vm_dir/uv" uv &&
                "$vm_dir/uv/bin/uv" venv --quiet --python 3.11 "$environment" &&
                "$vm_dir/uv/bin/uv" pip install --quiet --python "$python" --no-deps -r "$code_dir/requirements.lock" &&
                echo "$locked" >"$environment/.locked" && break
            sleep "$pause"
        done
        [ -f "$environment/.locked" ] || give_up "cannot install the environment of requirements.lock"
    fi
fi

patiently run_setup || give_up "a line of setup: failed"
cd "$code_dir" || give_up "no directory $code_dir"
"$python" launch/backends/cloud_tpu_vm.py --run_dir "$run_dir" --resource "$resource" --vm_dir "$vm_dir" ||
    give_up "the agent of the VM ended with code $?"
