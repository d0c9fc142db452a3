// What nginx's own directives cannot say: keys by their hash, health and info out of the answers of
// several replicas, and the errors of TorchServe in the form that the handler's have.
import crypto from 'crypto';

// --- requests

// The sha256 of the client's API key, in hex; "" without a key. Looking it up in a hash table tells
// a client nothing by how long it takes: that depends on the digest, and whoever could choose
// digests at will would have broken sha256.
function keyHash(r) {
    const bearer = /^Bearer +(\S+)$/i.exec(r.headersIn['Authorization'] || '');
    const key = bearer ? bearer[1] : r.headersIn['X-API-Key'];
    return key ? crypto.createHash('sha256').update(key).digest('hex') : '';
}

// --- errors

// Of this answer; each request has a copy of this module to itself.
let reshaped = false;
let original = '';

// Errors that the handler has not made (it names its model's version) get another body.
function reshapeHeaders(r) {
    if (r.status < 400 || r.headersOut['X-Model-Version']) {
        return;
    }
    reshaped = true;
    delete r.headersOut['Content-Length'];
    r.headersOut['Content-Type'] = 'application/json';
}

function reshapeBody(r, data, flags) {
    if (!reshaped) {
        r.sendBuffer(data, flags);
        r.done();
        return;
    }
    original += data;
    if (flags.last) {
        r.sendBuffer(errorBody(r), flags);
    }
}

// TorchServe's message where it tells the client something; ours else.
function errorBody(r) {
    let message = r.variables.error_message;
    try {
        message = (r.status < 500 && JSON.parse(original).message) || message;
    } catch (e) { /* nginx's own page, or nothing */ }
    return JSON.stringify({
        status: 'error', code: r.status, type: r.variables.error_type, message: message
    });
}

// --- health and info

// Kept for so many seconds, and as long again while the next one is made.
function answer(r, status, content, seconds) {
    r.headersOut['Content-Type'] = 'application/json';
    r.headersOut['Cache-Control'] = `max-age=${seconds}, stale-while-revalidate=${seconds}`;
    r.return(status, JSON.stringify(content) + '\n');
}

// 200 when every model has a READY worker on one replica at least, else 503 with what is missing.
async function health(r) {
    const targets = r.variables.health_targets.split(' ');
    const total = Number(r.variables.replicas);
    const asked = [];
    for (let replica = 0; replica < total; replica++) {
        asked.push(Promise.all(targets.map(target => isReady(r, replica, target))));
    }
    const replicas = await Promise.all(asked);
    const missing = targets.filter((_, i) => !replicas.some(ready => ready[i]));
    const content = {
        status: missing.length ? 'unhealthy' : 'healthy',
        model: targets[0].split('/')[0],
        replicas: { ready: replicas.filter(ready => ready.every(Boolean)).length, total: total },
    };
    if (missing.length) {
        content.missing = missing.map(target => `${target}: no replica has a READY worker`);
    }
    answer(r, missing.length ? 503 : 200, content, 1);
}

async function isReady(r, replica, target) {
    const reply = await r.subrequest(`/replica/${replica}/${target}`);
    try {
        return JSON.parse(reply.responseText)[0].workers.some(worker => worker.status === 'READY');
    } catch (e) { // no TorchServe, or no such model
        return false;
    }
}

// The handler's own description of the model, from the first replica that gives one.
async function info(r) {
    const target = r.uri.slice('/info/'.length);
    for (let replica = 0; replica < Number(r.variables.replicas); replica++) {
        const reply = await r.subrequest(`/describe/${replica}/${target}`);
        try {
            const facts = JSON.parse(reply.responseText)[0].customizedMetadata;
            if (facts.model) {
                answer(r, 200, facts, 10);
                return;
            }
        } catch (e) { /* the next one */ }
    }
    answer(r, 503, {
        status: 'error', code: 503, type: 'Unavailable', message: `no replica describes ${target}`
    }, 1);
}

export default { keyHash, reshapeHeaders, reshapeBody, health, info };
