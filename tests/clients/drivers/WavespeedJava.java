// The Java SDK, from the classes that its own build leaves in target. Whatever asks Java's proxy
// selector, as OkHttp does at every call, is kept on this machine.

import ai.wavespeed.Config;
import ai.wavespeed.Wavespeed;
import ai.wavespeed.api.Client;
import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.ToNumberPolicy;
import com.google.gson.ToNumberStrategy;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Proxy;
import java.net.ProxySelector;
import java.net.SocketAddress;
import java.net.URI;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;

public class WavespeedJava {
    static class Stay extends ProxySelector {
        @Override
        public List<Proxy> select(URI uri) {
            String host = uri.getHost();
            if (host.equals("localhost") || host.startsWith("127.")) {
                return List.of(Proxy.NO_PROXY);
            }
            try {
                String line = "connect " + host + "\n";
                Path log = Path.of(System.getenv("LEFT_LOOPBACK"));
                Files.writeString(log, line, StandardOpenOption.CREATE, StandardOpenOption.APPEND);
                // Port 9, discard: nobody listens.
                InetAddress here = InetAddress.getLoopbackAddress();
                return List.of(new Proxy(Proxy.Type.HTTP, new InetSocketAddress(here, 9)));
            } catch (IOException error) {
                throw new IllegalStateException(error);
            }
        }

        @Override
        public void connectFailed(URI uri, SocketAddress address, IOException error) {}
    }

    static class Job {
        String url;
        String key;
        String model;
        String file;
        String dead;
        Map<String, Object> body;
    }

    static Client client(Job job, String key) {
        return new Client(key, job.url, null, null, null, null);
    }

    static Object run(Client client, Job job, Map<String, Object> changes, boolean sync) {
        Map<String, Object> body = new HashMap<>(job.body);
        body.putAll(changes);
        return client.run(job.model, body, null, 0.1, sync, null).get("outputs");
    }

    static Object module(Job job) {
        Config.api.baseUrl = job.url;
        Config.api.apiKey = job.key;
        return Wavespeed.run(job.model, job.body).get("outputs");
    }

    public static void main(String[] arguments) throws Exception {
        ProxySelector.setDefault(new Stay());
        // 7 stays 7, as a caller writes it, and does not become 7.0.
        ToNumberStrategy whole = ToNumberPolicy.LONG_OR_DOUBLE;
        Gson gson = new GsonBuilder().setObjectToNumberStrategy(whole).create();
        Job job = gson.fromJson(Files.readString(Path.of(arguments[0])), Job.class);
        Client client = client(job, job.key);
        Client stranger = client(job, "frs_not-a-key");

        Map<String, Callable<Object>> cases = new LinkedHashMap<>();
        cases.put("run", () -> run(client, job, Map.of(), false));
        cases.put("module", () -> module(job));
        cases.put("sync", () -> run(client, job, Map.of(), true));
        cases.put("upload", () -> run(client, job, Map.of("image", client.upload(job.file)), false));
        cases.put("bad key", () -> run(stranger, job, Map.of(), false));
        cases.put("bad parameter", () -> run(client, job, Map.of("num_images", 5), false));
        cases.put("dead URL", () -> run(client, job, Map.of("image", job.dead), false));

        Map<String, Map<String, Object>> answers = new LinkedHashMap<>();
        for (Map.Entry<String, Callable<Object>> each : cases.entrySet()) {
            try {
                answers.put(each.getKey(), Map.of("value", each.getValue().call()));
            } catch (Exception error) {
                answers.put(each.getKey(), Map.of("error", error.toString()));
            }
        }
        Files.writeString(Path.of(arguments[1]), gson.toJson(answers));
        System.exit(0); // OkHttp's idle threads would keep it for a minute
    }
}
