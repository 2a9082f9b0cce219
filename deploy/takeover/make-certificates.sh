#!/bin/sh
# Makes a certificate for api.wavespeed.ai and wavespeed.ai, and the authority that signs it, both in
# FOLDER:
#
#   ./make-certificates.sh FOLDER [DAYS]
#
# ca.crt goes to the machines of your clients; ca.key can sign for any name, and every client that
# trusts ca.crt believes it: keep it off the server, or delete it. DAYS (365) is for both.
set -eu

name=api.wavespeed.ai
site=wavespeed.ai # ComfyUI's nodes and the desktop app read the catalogue there
folder=${1:?usage: $0 FOLDER [DAYS]}
days=${2:-365}
umask 077
mkdir -p "$folder"
cd "$folder"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days "$days" \
  -keyout ca.key -out ca.crt -subj "/CN=Takeover of $name" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign"
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
  -keyout "$name.key" -out "$name.csr" -subj "/CN=$name"
cat >"$name.ext" <<EOF
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:$name, DNS:$site
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
EOF
openssl x509 -req -in "$name.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days "$days" \
  -extfile "$name.ext" -out "$name.crt"
rm "$name.csr" "$name.ext"
